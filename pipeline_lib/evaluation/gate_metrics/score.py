"""The reward model's score."""

from __future__ import annotations

from typing import ClassVar

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class Score(Frozen):
    """Mean score of the answers, or its gain over another model."""

    unit: ClassVar[str] = "normalised score"
    against: str | None = None
    """A model of the run (`base`, `sft`, `champion`): the difference to it; null: the figure itself."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval over prompts."""
        mine = [row.score for row in evidence.models[candidate]]
        if self.against is None:
            return stats.interval([mine], stats.mean, bootstrap)
        theirs = [row.score for row in evidence.models[self.against]]
        return stats.interval([mine, theirs], stats.difference_of_means, bootstrap)
