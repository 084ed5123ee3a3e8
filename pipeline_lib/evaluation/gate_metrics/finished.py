"""Answers that end by themselves."""

from __future__ import annotations

from typing import ClassVar

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class Finished(Frozen):
    """Share of the answers that were not cut at the token limit, or its difference to another model's."""

    unit: ClassVar[str] = "fraction"
    against: str | None = None
    """A model of the run: the difference to it; null: the share itself."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval over prompts."""
        mine = [float(row.is_finished) for row in evidence.models[candidate]]
        if self.against is None:
            return stats.interval([mine], stats.mean, bootstrap)
        theirs = [float(row.is_finished) for row in evidence.models[self.against]]
        return stats.interval([mine, theirs], stats.difference_of_means, bootstrap)
