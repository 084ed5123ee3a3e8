"""The row of the table that no training is in: reference log-probabilities over a sweep of three betas.

Ours once, since the figures depend on the model and the texts alone; TRL's trainer for each beta.
Seconds are those of the scoring itself on both sides, without the loading of models.
"""

from __future__ import annotations

from typing import Any

from benchmarks.jobs import Options
from pipeline_lib.validation import Frozen


class SweepResult(Frozen):
    """What three runs that differ in beta alone spend on their reference."""

    options: Options
    processor: str
    dtype: str
    rows: int
    ours_s: list[float]
    """Seconds of scoring for each beta; 0 where the figures were found."""
    peer_s: list[float]
    peer_scored_rows: list[int]

    @property
    def times_faster(self) -> float:
        """The other side's seconds over ours."""
        return sum(self.peer_s) / sum(self.ours_s)

    @classmethod
    def of(cls, options: Options, facts: dict[str, Any], ours_s: list[float], peer: dict[str, Any]) -> SweepResult:
        """Put both sides' figures together."""
        return cls(
            options=options, processor=facts["processor"], dtype=facts["dtype"],
            rows=options.rows_per_step * options.steps, ours_s=ours_s,
            peer_s=[run["seconds"] for run in peer["betas"]],
            peer_scored_rows=[run["scored_rows"] for run in peer["betas"]],
        )  # fmt: skip

    def sentence(self) -> str:
        """Return the result in words."""
        return (
            f"Reference log-probabilities of a sweep over {len(self.ours_s)} values of beta, {self.rows} pairs: ours "
            f"{sum(self.ours_s):.1f} s ({', '.join(f'{each:.1f}' for each in self.ours_s)}), TRL "
            f"{sum(self.peer_s):.1f} s ({', '.join(f'{each:.1f}' for each in self.peer_s)}): "
            f"{self.times_faster:.1f} × faster."
        )
