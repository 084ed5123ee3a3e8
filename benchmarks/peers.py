"""Prefline and TRL side by side: `python -m benchmarks.peers` (`make bench`).

Every job is measured in pairs of runs, ours and the other in turn, each in a process of its own, on
the same rows, token ids, first weights and updates. The driver itself imports no torch: a child's
peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from benchmarks.fairness import problems_of
from benchmarks.jobs import JOBS, PRESETS, JobName, Measured, Options, Plan, Result, Side
from benchmarks.sweep import SweepResult
from benchmarks.table import write_page
from pipeline_lib.models.settings import Precision
from pipeline_lib.storage.embedded import EmbeddedS3

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "performance.md"
WORK = ROOT / ".prefline-bench"
PEER_PYTHON = ROOT / ".venv-peer" / "bin" / "python"

SWEEP = "sweep"
TRIED_STEPS = 3
"""Updates by which TRL's rows of a forward are chosen."""

logger = logging.getLogger("benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen jobs, write their results, and the table of all results there are."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    chosen = _parser().parse_args(arguments)
    preset = PRESETS[chosen.preset]
    options = Options(
        preset=chosen.preset, trainable=chosen.trainable, precision=chosen.precision, device=chosen.device,
        threads=chosen.threads, rows_per_step=chosen.rows or preset.rows_per_step, steps=chosen.steps or preset.steps,
        runs=chosen.runs or preset.runs, pack_tokens=chosen.pack_tokens or preset.pack_tokens,
        peer_rows=chosen.peer_rows, tokens_per_batch=chosen.tokens_per_batch,
        gradient_checkpointing=chosen.gradient_checkpointing,
    )  # fmt: skip
    # Of the tiny model nothing is kept: it shows that the harness works, not how fast anything is.
    is_kept = chosen.preset != "tiny"
    results, page = (RESULTS, PAGE) if is_kept else (WORK / "results", WORK / "performance.md")
    results.mkdir(parents=True, exist_ok=True)
    write_page(results, page)  # a page without its markers is told now, not in an hour
    for name in chosen.jobs or [*JOBS, SWEEP]:
        with _store():
            result = (
                measure_sweep(options, peer_python=chosen.peer_python)
                if name == SWEEP
                else measure(name, options, peer_python=chosen.peer_python)
            )
        file_name = f"{options.preset}-{options.device}-{result.dtype}-{options.trainable}-{name}.json"
        (results / file_name).write_text(result.model_dump_json(indent=1) + "\n")
    print(write_page(results, page))
    return 0


@contextmanager
def _store() -> Iterator[None]:
    """Run the embedded store, where the jobs' inputs are."""
    WORK.mkdir(exist_ok=True)
    server = EmbeddedS3(WORK)
    (WORK / "store.json").write_text(server.start().model_dump_json())
    try:
        yield
    finally:
        server.stop()


def measure(name: JobName, options: Options, *, peer_python: Path) -> Result:
    """Prepare a job, run both sides in turn, and compare.

    Args:
        name: The job.
        options: The command line's choice.
        peer_python: Python of the environment that TRL is installed in.
    """
    plan, facts = _prepared(name, options)
    if JOBS[name].other == "peer" and name != "sft" and options.peer_rows is None:
        options = options.model_copy(update={"peer_rows": _fastest_rows(plan, peer_python)})
        plan = plan.model_copy(update={"options": options})
    sides: tuple[Side, Side] = ("ours", JOBS[name].other)
    runs: dict[Side, list[Measured]] = {side: [] for side in sides}
    for number in range(options.runs):
        for side in sides:
            plan = plan.model_copy(update={"side": side})
            if side == "peer":
                _run(plan, str(peer_python), ["-m", "benchmarks.peer_trl"])
            else:
                _run(plan, sys.executable, ["-m", "benchmarks.ours", "measure"])
            measured = Measured.model_validate_json(plan.output.read_bytes())
            runs[side].append(measured)
            logger.info(
                "%s, run %d, %s: %.1f s for %d updates, %.2f GiB, loss %.4f -> %.4f", name, number + 1, side,
                measured.timed_s, options.steps - 1, measured.peak_bytes / 2**30, measured.losses[0],
                measured.losses[-1],
            )  # fmt: skip
    result = Result(
        job=name, options=options, processor=facts["processor"], dtype=facts["dtype"],
        matmul_flops=facts["matmul_flops"], work=facts["work"], runs=runs, problems=[],
    )  # fmt: skip
    problems = problems_of(result)
    for problem in problems:
        logger.warning("%s does not count: %s", name, problem)
    return result.model_copy(update={"problems": problems})


def _fastest_rows(plan: Plan, peer_python: Path) -> int:
    """Return the rows of a forward with which TRL takes least time for a few updates."""
    rows = plan.options.rows_per_step
    seconds: dict[int, float] = {}
    for number in sorted({max(1, rows // 4), max(1, rows // 2), rows}):
        if rows % number == 0:
            few = {"peer_rows": number, "steps": min(TRIED_STEPS, plan.options.steps)}
            tried = plan.model_copy(update={"side": "peer", "options": plan.options.model_copy(update=few)})
            _run(tried, str(peer_python), ["-m", "benchmarks.peer_trl"])
            measured = Measured.model_validate_json(plan.output.read_bytes())
            seconds[number] = measured.timed_s
            logger.info(
                "TRL with %d rows a forward: %.1f s, %.2f GiB", number, measured.timed_s, measured.peak_bytes / 2**30
            )
    return min(seconds, key=lambda number: seconds[number])


def measure_sweep(options: Options, *, peer_python: Path) -> SweepResult:
    """Measure what three runs that differ in beta alone spend on their reference."""
    plan, facts = _prepared("dpo", options)
    _run(plan, sys.executable, ["-m", "benchmarks.ours", "sweep"])
    ours_s = json.loads(plan.output.read_text())
    _run(plan, str(peer_python), ["-m", "benchmarks.peer_reference_cache", facts["model"], str(plan.output)])
    result = SweepResult.of(options, facts, ours_s, json.loads(plan.output.read_text()))
    logger.info(result.sentence())
    return result


def _prepared(name: JobName, options: Options) -> tuple[Plan, dict[str, Any]]:
    """Make a job's inputs; return the plan of its processes, and what is known of machine and model."""
    folder = WORK / f"{options.preset}-{name}"
    plan = Plan(job=name, side="ours", options=options, folder=folder, output=folder / "measured.json")
    _run(plan, sys.executable, ["-m", "benchmarks.ours", "prepare"])
    return plan, json.loads((folder / "facts.json").read_text())


def _run(plan: Plan, python: str, module: list[str]) -> None:
    """Run one process to its end; its output goes to this one's."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    path = plan.folder / "plan.json"
    path.write_text(plan.model_dump_json())
    threads = str(plan.options.threads)
    environment = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(WORK / "datasets"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    if plan.options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([python, *module, str(path)], cwd=ROOT, env=environment, check=True)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in (*JOBS, SWEEP)]
    if unknown:
        raise argparse.ArgumentTypeError(f"no job {', '.join(unknown)}; there are {', '.join([*JOBS, SWEEP])}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Prefline and TRL side by side.")
    parser.add_argument("--preset", choices=list(PRESETS), default="smollm2")
    parser.add_argument("--jobs", type=_names, help=f"of {', '.join([*JOBS, SWEEP])}; all")
    parser.add_argument("--trainable", choices=["lora", "full"], default="lora")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for name, what in (
        ("rows", "rows of an update"), ("steps", "updates, the first untimed"), ("runs", "paired runs"),
        ("pack-tokens", "length of TRL's packed sequences"), ("peer-rows", "rows of one of TRL's forwards; tried out"),
        ("tokens-per-batch", "tokens of one of our forwards"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=what)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="Python with TRL")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
