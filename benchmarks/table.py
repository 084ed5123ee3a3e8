"""The results as a Markdown table, written between two markers of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks.fairness import loss_gap_frac
from benchmarks.jobs import JOBS, JobSpec, Measured, Result
from benchmarks.page import write_between
from benchmarks.sweep import SweepResult

_HEAD = (
    "| job | ours | other side | times faster (goal) | memory, ours / other | share (goal) | MFU, ours / other | "
    "last loss, ours / other |\n|---|---|---|---|---|---|---|---|"
)


def write_page(results: Path, page: Path) -> str:
    """Write the table of all results of a folder between the page's markers; make the page where there is none.

    Returns:
        The generated part.
    """
    paths = sorted(results.glob("*.json"))
    trained = [path for path in paths if not path.stem.endswith("-sweep")]
    sweeps = [SweepResult.model_validate_json(path.read_bytes()) for path in paths if path not in trained]
    generated = render([Result.model_validate_json(path.read_bytes()) for path in trained], sweeps)
    write_between(page, "bench", generated, heading=None if page.exists() else "## Training, beside TRL")
    return generated


def render(results: list[Result], sweeps: list[SweepResult]) -> str:
    """Return tables of results, one for each machine, format and way of training."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(_kind(result), []).append(result)
    order = list(JOBS)
    tables = [_group(sorted(members, key=lambda result: order.index(result.job))) for members in groups.values()]
    return "\n\n".join([*tables, *(f"{sweep.processor}: {sweep.sentence()}" for sweep in sweeps)])


def _kind(result: Result) -> tuple[str, ...]:
    options = result.options
    return options.preset, result.processor, result.dtype, options.trainable


def _group(results: list[Result]) -> str:
    first = results[0]
    options = first.options
    rates = {name: median(result.matmul_flops[name] for result in results) / 1e9 for name in first.matmul_flops}
    what = "LoRA, rank 16, all linear layers" if options.trainable == "lora" else "every weight"
    lines = [
        f"**{options.preset}**, {first.dtype}, training {what}; {first.processor}. Matrix products: "
        + ", ".join(f"{rate:,.3g} GFLOP/s in {name}" for name, rate in rates.items())
        + f". Medians of {options.runs} paired runs of {options.steps} updates, the first untimed.",
        "",
        _HEAD,
        *(_line(result) for result in results),
        "",
        *(f"- `{result.job}`: {_side_notes(result)}" for result in results),
    ]
    return "\n".join(lines)


def _line(result: Result) -> str:
    spec = JOBS[result.job]
    ours, other = result.runs["ours"], result.runs[spec.other]
    if result.problems:
        reason = "; ".join(result.problems)
        return f"| {spec.title} | | | does not count: {reason} | | | | {_losses(ours[0], other[0])} |"
    amount = result.work.pairs if spec.unit == "pairs" else result.work.tokens
    rates = [median(amount / run.timed_s for run in runs) for runs in (ours, other)]
    peak = "peak_gpu_bytes" if result.options.device == "cuda" else "peak_bytes"
    memory = [median(getattr(run, peak) for run in runs) / 2**30 for runs in (ours, other)]
    rate = result.matmul_flops["bf16" if result.dtype == "bfloat16" else "fp32"]
    used = [median(result.work.flops / run.timed_s / rate for run in runs) for runs in (ours, other)]
    speedup = median(theirs.timed_s / mine.timed_s for mine, theirs in zip(ours, other, strict=True))
    share = memory[0] / memory[1]
    goal = "" if spec.memory_goal is None else f" (≤ {spec.memory_goal:g})"
    return (
        f"| {spec.title} | {_rate(rates[0], spec)} | {_rate(rates[1], spec)} | "
        f"{speedup:.2f} × (≥ {spec.speed_goal:g}) | {memory[0]:.2f} / {memory[1]:.2f} GiB | {share:.2f}{goal} | "
        f"{used[0]:.0%} / {used[1]:.0%} | {_losses(ours[0], other[0])} |"
    )


def _rate(rate: float, spec: JobSpec) -> str:
    return f"{rate:.2f} pairs/s" if spec.unit == "pairs" else f"{rate:,.0f} tokens/s"


def _losses(ours: Measured, other: Measured) -> str:
    return f"{ours.losses[-1]:.4f} / {other.losses[-1]:.4f} ({loss_gap_frac(ours, other):.2%})"


def _side_notes(result: Result) -> str:
    other = result.runs[JOBS[result.job].other][0]
    versions = ", ".join(f"{name} {version}" for name, version in other.versions.items())
    same = (
        f"{other.tokens:,} tokens, {other.counted_tokens:,} of them counted, "
        f"{other.trainable_parameters:,} trained numbers"
    )
    return f"{other.note or 'Prefline, each pair a row of its own'}; {same}; {versions}"
