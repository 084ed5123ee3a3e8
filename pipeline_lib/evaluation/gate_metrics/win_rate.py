"""Pairwise win rate, judged by the reward model."""

from __future__ import annotations

from typing import ClassVar

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class WinRate(Frozen):
    """(wins + ties / 2) / N: how often the candidate's answer scores higher on the same prompt."""

    unit: ClassVar[str] = "fraction"
    against: str = "base"
    """The model to win against."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the win rate with its interval over prompts."""
        mine = [row.score for row in evidence.models[candidate]]
        theirs = [row.score for row in evidence.models[self.against]]
        return stats.interval([mine, theirs], stats.win_rate, bootstrap)
