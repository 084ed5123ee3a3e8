"""What `rollouts` found, as a section of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

from benchmarks.page import write_between
from pipeline_lib.validation import Frozen

_HEADING = (
    "## Rollouts\n\n`python -m benchmarks.rollouts` measures the table below; "
    "what the generators are: [rollouts](methods/rollouts.md)."
)
_PLAIN = "generate"
_LABELS = {_PLAIN: "`model.generate`", "batched": "`batched`", "continuous": "`continuous`"}


class Run(Frozen):
    """One side in one run."""

    side: str
    number: int
    seconds: float
    cpu_seconds: float
    """Of all threads; what other programs do meanwhile hardly shows in it."""
    lengths: list[int]
    """Tokens of each response, its end included."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of responses a second, the prompts' time included."""
        return sum(self.lengths) / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """Tokens of responses a second of processor time."""
        return sum(self.lengths) / self.cpu_seconds


class Result(Frozen):
    """All runs on some prompts."""

    model: str
    prompts: int
    batch: int
    max_new_tokens: int
    prompt_tokens: list[int]
    dtype: str
    processor: str
    goal: float
    runs: list[Run]
    versions: dict[str, str]

    def of(self, side: str) -> list[Run]:
        """Return a side's runs in their order."""
        return sorted((run for run in self.runs if run.side == side), key=lambda run: run.number)

    def speedup(self, side: str) -> float:
        """Return the median over runs of a side's tokens a second over those of `model.generate` in the same run."""
        pairs = zip(self.of(side), self.of(_PLAIN), strict=True)
        return median(ours.tokens_per_s / plain.tokens_per_s for ours, plain in pairs)

    def cpu_speedup(self, side: str) -> float:
        """Return the same of tokens a second of processor time."""
        pairs = zip(self.of(side), self.of(_PLAIN), strict=True)
        return median(ours.tokens_per_cpu_s / plain.tokens_per_cpu_s for ours, plain in pairs)


def write_section(results: Path, page: Path) -> str:
    """Write all results of a folder between the page's markers; append the section where there is none.

    Returns:
        The generated part.
    """
    found = [Result.model_validate_json(path.read_bytes()) for path in sorted(results.glob("*.json"))]
    generated = "\n\n".join(_part(result) for result in found)
    write_between(page, "rollouts", generated, heading=_HEADING)
    return generated


def _part(result: Result) -> str:
    lengths = result.prompt_tokens
    numbers = len(result.of(_PLAIN))
    lines = [
        f"**{result.model}**, {result.dtype}; {result.processor}. {result.prompts} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens (mean {mean(lengths):.0f}), {result.batch} rows at once, responses of at most "
        f"{result.max_new_tokens} tokens, temperature 1. Medians of {numbers} paired runs, the prompts' time included; "
        "tokens count up to the end of a response.",
        "",
        f"| generator | tokens/s | times `model.generate` (goal {result.goal:g}) | the same by processor time | "
        "tokens a response | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for side, label in _LABELS.items():
        runs = result.of(side)
        if runs:
            speeds = [run.tokens_per_s for run in runs]
            tokens = mean(length for run in runs for length in run.lengths)
            middle_s = median(run.seconds for run in runs)
            lines.append(
                f"| {label} | {median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f}) | "
                f"{result.speedup(side):.2f} | {result.cpu_speedup(side):.2f} | {tokens:.0f} | {middle_s:.1f} |"
            )
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return "\n".join([*lines, "", f"{versions}."])
