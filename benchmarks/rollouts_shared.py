"""What does it save that the samples of a prompt share its keys and values? Memory and speed beside copies.

`python -m benchmarks.rollouts_shared` samples K responses of fixed length to prompts of fixed length, each side in a
process of its own, in turn; `generate_batch` is transformers' own continuous batching on a paged cache. Memory is what
a process holds at most while it samples, less what it held before: keys, values and whatever else sampling needs.
The table goes to standard output and from there into `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.rollouts import make_prompts
from benchmarks.same import SEED
from benchmarks.work import processor_name
from pipeline_lib.generation.prompt_slots import CopiedPrompts, PromptSlots
from pipeline_lib.generation.shared_prompts import SharedPrompts
from pipeline_lib.generation.slot_run import SlotRun
from pipeline_lib.models.base import SMOLLM2, import_base_model, load_causal_model
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder
from pipeline_lib.validation import Frozen

OURS: dict[str, type[PromptSlots]] = {"copied": CopiedPrompts, "shared": SharedPrompts}
PAGED = "generate_batch"
SIDES = (*OURS, PAGED)
_PAGE_TOKENS = 32


class Work(Frozen):
    """What every side does."""

    model: str
    prompts: int
    prompt_tokens: int
    samples: int
    response_tokens: int
    threads: int


class Run(Frozen):
    """One side in one run."""

    side: str
    seconds: float
    cpu_seconds: float
    """Of all threads; what other programs do meanwhile hardly shows in it."""
    peak_bytes: int
    """What the process held at most while it sampled, beyond what it held before."""


class Result(Frozen):
    """All runs."""

    work: Work
    processor: str
    versions: dict[str, str]
    runs: list[Run]

    def row(self, side: str) -> str:
        """Return a line of the table."""
        runs = [run for run in self.runs if run.side == side]
        tokens = self.work.prompts * self.work.samples * self.work.response_tokens
        speed, cpu_speed = (tokens / median(getattr(run, name) for run in runs) for name in ("seconds", "cpu_seconds"))
        peak = median(run.peak_bytes for run in runs) / 2**20
        return f"| {side} | {speed:.1f} | {cpu_speed:.1f} | {peak:.0f} |"


def main() -> None:
    """Measure and print the table; with `--side`, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/rollouts-shared"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    work = Work(**{name: getattr(chosen, name) for name in Work.model_fields})
    if chosen.side:
        print(run_here(chosen.folder, work, chosen.side).model_dump_json())
        return
    torch.set_num_threads(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), work, num_runs=chosen.runs)
    chosen.results.mkdir(parents=True, exist_ok=True)
    name = f"{work.model}-{work.prompts}x{work.samples}.json"
    (chosen.results / name).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    print("| prompts | tokens/s | tokens a second of processor time | MiB |\n|---|---|---|---|")
    print("\n".join(result.row(side) for side in SIDES))


def measure(folder: Path, work: Work, *, num_runs: int) -> Result:
    """Run every side in every run, in turn the first."""
    import_base_model(work.model, folder / "model", revision=None, chat_template=None, seed=SEED)
    runs = []
    for number in range(num_runs):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            options = [f"--{name.replace('_', '-')}={value}" for name, value in work.model_dump().items()]
            command = [sys.executable, "-m", "benchmarks.rollouts_shared", f"--side={side}", f"--folder={folder}"]
            told = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(Run.model_validate(json.loads(told.splitlines()[-1])))
            run = runs[-1]
            print(f"run {number}, {side}: {run.seconds:.1f} s, {run.cpu_seconds:.1f} s of processors", flush=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    return Result(work=work, processor=processor_name(torch.device("cpu")), versions=versions, runs=runs)


def run_here(folder: Path, work: Work, side: str) -> Run:
    """Sample in this process."""
    torch.set_num_threads(work.threads)
    chat = ChatTokenizer.load(folder / "model")
    model = load_causal_model(folder / "model", dtype=torch.float32)
    encoder = Encoder(chat, work.prompt_tokens * 4, max_response_tokens=1)
    long = make_prompts(encoder, count=work.prompts, at_least=work.prompt_tokens, below=work.prompt_tokens * 4)
    prompts = [ids[: work.prompt_tokens] for ids in long]
    sample = in_pages if side == PAGED else in_slots
    sample(model, prompts[:1], work.model_copy(update={"response_tokens": 2}), side)  # the first use is not measured
    before_bytes = _held_bytes(reset=True)
    started, started_cpu = time.perf_counter(), time.process_time()
    sample(model, prompts, work, side)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    return Run(side=side, seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=_held_bytes() - before_bytes)


def in_slots(model: PreTrainedModel, prompts: list[list[int]], work: Work, side: str) -> None:
    """Sample with ours, all responses at once."""
    settings = SamplingSettings(
        max_new_tokens=work.response_tokens, stops_at_eos=False, batch_size=work.prompts * work.samples
    )
    run = SlotRun(
        model, prompts, settings, slots=OURS[side], eos_id=0, pad_id=0, seed=SEED, samples_per_prompt=work.samples,
        on_batch=None,
    )  # fmt: skip
    assert all(len(sample.ids) == work.response_tokens for sample in run.samples())


def in_pages(model: PreTrainedModel, prompts: list[list[int]], work: Work, side: str) -> None:  # noqa: ARG001 - as above
    """Sample with transformers' continuous batching, with as many pages as it needs."""
    pages = -(-(work.prompt_tokens + work.response_tokens) // _PAGE_TOKENS) * work.prompts * work.samples
    found = model.generate_batch(
        prompts,
        GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.response_tokens, eos_token_id=-1,
            pad_token_id=0, num_return_sequences=work.samples,
        ),
        ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS, num_blocks=pages + 8, max_batch_tokens=work.prompts * work.prompt_tokens, seed=SEED
        ),
    )  # fmt: skip
    assert (
        sum(len(one.generated_tokens) for one in found.values()) == len(prompts) * work.samples * work.response_tokens
    )


def _held_bytes(*, reset: bool = False) -> int:
    """Return what this process held at most since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
