"""Whether a comparison counts: both sides did the same training, or it says why not."""

from __future__ import annotations

from itertools import zip_longest

from benchmarks.jobs import JOBS, Measured, Result

LOSS_TOLERANCE_FRAC = 0.01
"""How far the last update's losses may be apart."""


def problems_of(result: Result) -> list[str]:
    """Return every reason why a comparison does not count, in words; none: it counts."""
    ours, other = result.runs["ours"], result.runs[JOBS[result.job].other]
    problems = _unsteady("ours", ours) + _unsteady("the other side", other)
    first, second = ours[0], other[0]
    if result.job == "kwise":
        # The same comparisons in other batches: rows differ by design, the losses may not.
        return problems + _loss_problems(first, second)
    differing = [step for step, pair in enumerate(zip_longest(first.digests, second.digests)) if pair[0] != pair[1]]
    if differing:
        problems.append(
            f"token ids or labels differ in {len(differing)} of {len(first.digests)} updates, first in update "
            f"{differing[0] + 1}"
        )
    if (first.tokens, first.counted_tokens) != (second.tokens, second.counted_tokens):
        problems.append(
            f"{first.tokens} tokens, {first.counted_tokens} of them counted, on our side; {second.tokens} and "
            f"{second.counted_tokens} on the other"
        )
    if first.trainable_parameters != second.trainable_parameters:
        problems.append(f"we train {first.trainable_parameters} numbers, the other side {second.trainable_parameters}")
    return problems + _loss_problems(first, second)


def loss_gap_frac(first: Measured, second: Measured) -> float:
    """Return how far the last losses are apart, as a share of the other side's."""
    return abs(first.losses[-1] - second.losses[-1]) / max(abs(second.losses[-1]), 1e-12)


def _loss_problems(first: Measured, second: Measured) -> list[str]:
    if len(first.losses) != len(second.losses):
        return [f"{len(first.losses)} updates on our side, {len(second.losses)} on the other"]
    gap = loss_gap_frac(first, second)
    if not gap <= LOSS_TOLERANCE_FRAC:
        return [
            f"the last losses are {gap:.1%} apart ({first.losses[-1]:.4f} and {second.losses[-1]:.4f}); "
            f"{LOSS_TOLERANCE_FRAC:.0%} is allowed"
        ]
    return []


def _unsteady(side: str, runs: list[Measured]) -> list[str]:
    """A side whose runs train on different rows measures something else each time."""
    if any(run.digests != runs[0].digests for run in runs):
        return [f"{side} trained on other rows from run to run"]
    return []
