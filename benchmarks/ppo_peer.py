"""PPO beside TRL 0.24's PPOTrainer: `python -m benchmarks.ppo_peer` (`make bench-ppo`).

The last TRL that has a PPOTrainer runs in an environment of its own. Same model, prompts, rule,
responses, minibatches, epochs and constants; every run is a process, both sides in turn, and medians
count. The driver itself imports no torch: a child's peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import ROOT, WORK
from benchmarks.ppo_peer_jobs import PRESETS, PpoMeasured, PpoPlan, PpoResult, Prepared, Side
from benchmarks.ppo_peer_table import write_section

RESULTS = Path(__file__).parent / "results" / "ppo-peer"
PAGE = ROOT / "docs" / "performance.md"
PEER_PYTHON = ROOT / ".venv-ppo-peer" / "bin" / "python"
SIDES: tuple[Side, Side] = ("ours", "peer")
FOR_TRIAL = "toy-lora"
"""Shows that the harness works, and nothing else: it is not kept."""

logger = logging.getLogger("benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen presets, and write their results and the section of all results there are."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_peer", description=__doc__)
    parser.add_argument("--presets", nargs="*", choices=list(PRESETS), default=["smollm2-ends", "smollm2", "toy"])
    parser.add_argument("--runs", type=int, help="paired runs")
    parser.add_argument("--iterations", type=int, help="rounds of sampling and updating, the first untimed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="Python with TRL 0.24")
    parser.add_argument("--trial", action="store_true", help="keep nothing")
    chosen = parser.parse_args(arguments)
    changed = {
        name: value for name in ("runs", "iterations") if (value := getattr(chosen, name)) is not None
    }  # fmt: skip
    for name in chosen.presets:
        plan = PpoPlan(
            side="ours", preset=PRESETS[name].model_copy(update=changed), threads=chosen.threads,
            folder=WORK / f"ppo-{name}", output=WORK / f"ppo-{name}.json",
        )  # fmt: skip
        result = measure(name, plan, peer_python=chosen.peer_python)
        if not chosen.trial and name != FOR_TRIAL:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name}.json").write_text(result.model_dump_json(indent=1) + "\n")
    if not chosen.trial:
        print(write_section(RESULTS, PAGE))
    return 0


def measure(name: str, plan: PpoPlan, *, peer_python: Path) -> PpoResult:
    """Prepare a preset and run both sides in turn.

    Args:
        name: The preset's.
        plan: Of our first process.
        peer_python: Python of the environment that TRL is installed in.
    """
    run_process(plan, sys.executable, ["-m", "benchmarks.ppo_peer_ours", "prepare"])
    prepared = Prepared.model_validate_json((plan.folder / "prepared.json").read_bytes())
    runs: dict[Side, list[PpoMeasured]] = {side: [] for side in SIDES}
    for number in range(plan.preset.runs):
        for side in SIDES:
            own = plan.model_copy(update={"side": side})
            if side == "ours":
                run_process(own, sys.executable, ["-m", "benchmarks.ppo_peer_ours", "measure"])
            else:
                run_process(own, str(peer_python), ["-m", "benchmarks.ppo_peer_trl"])
            measured = PpoMeasured.model_validate_json(plan.output.read_bytes())
            runs[side].append(measured)
            logger.info(
                "%s, run %d, %s: %.1f s for %d iterations, %.2f GiB, rule %.3f -> %.3f", name, number + 1, side,
                measured.timed_s, plan.preset.iterations - 1, measured.peak_bytes / 2**30, measured.scores[0],
                measured.last_score,
            )  # fmt: skip
    return PpoResult(name=name, preset=plan.preset, processor=prepared.processor, threads=plan.threads, runs=runs)


def run_process(plan: PpoPlan, python: str, module: list[str]) -> None:
    """Run one process to its end; its output goes to this one's."""
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    path = plan.folder.parent / f"{plan.folder.name}-plan.json"
    path.write_text(json.dumps(plan.model_dump(mode="json")))
    threads = str(plan.threads)
    environment = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(WORK / "datasets"), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    subprocess.run([python, *module, str(path)], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
