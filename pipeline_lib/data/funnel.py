"""Count what every step let through, and say in words why nothing is left."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from pipeline_lib.errors import DataError
from pipeline_lib.schema import FunnelStep

_SHOWN_REASONS = 3


class Tally:
    """The rows that reached one reader or rule. Rows in = kept + rejected, by construction."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_kept = 0
        self.rejected: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def keep(self) -> None:
        """Count a row that went on."""
        self.num_kept += 1

    def reject(self, code: str, example: str) -> None:
        """Count a row that did not, and remember the first reason of each code."""
        self.rejected[code] += 1
        self._examples.setdefault(code, example)

    def step(self) -> FunnelStep:
        """Return the counts as a step of the funnel."""
        num_rejected = sum(self.rejected.values())
        return FunnelStep(
            name=self.name,
            rows_in=self.num_kept + num_rejected,
            rows_kept=self.num_kept,
            rejected=dict(sorted(self.rejected.items())),
        )

    def reasons(self) -> list[tuple[int, str, str]]:
        """Return `(count, code, first reason)` of every code."""
        return [(count, code, self._examples[code]) for code, count in self.rejected.items()]


def nothing_left(what: str, tallies: list[Tally], *, next_step: str) -> DataError:
    """Return the error for a set of which nothing is left, with the three most frequent reasons.

    Args:
        what: What is empty, with the file where there is one.
        tallies: The steps that refused the rows.
        next_step: What to do.
    """
    reasons = sorted((reason for tally in tallies for reason in tally.reasons()), key=lambda row: (-row[0], row[1]))
    num_rejected = sum(count for count, _, _ in reasons)
    if not reasons:
        return DataError(f"{what}: there are no rows at all", next_step=next_step)
    shown = "; ".join(f"{count} × {code} ({example})" for count, code, example in reasons[:_SHOWN_REASONS])
    return DataError(f"{what}: all {num_rejected} rows were refused: {shown}", next_step=next_step)


def check_conservation(steps: list[FunnelStep]) -> None:
    """Assert that no row got lost between or inside the steps of one chain."""
    for step in steps:
        assert step.rows_in == step.rows_kept + sum(step.rejected.values()), step
    for step, following in pairwise(steps):
        assert step.rows_kept == following.rows_in, (step, following)
