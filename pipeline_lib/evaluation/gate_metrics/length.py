"""Length of the answers."""

from __future__ import annotations

from typing import ClassVar

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class Length(Frozen):
    """Mean length of the answers in tokens, or its ratio to another model's."""

    unit: ClassVar[str] = "tokens, or a ratio"
    against: str | None = None
    """A model of the run: the ratio to it; null: the figure itself."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval over prompts."""
        mine = [float(row.response_tokens) for row in evidence.models[candidate]]
        if self.against is None:
            return stats.interval([mine], stats.mean, bootstrap)
        theirs = [float(row.response_tokens) for row in evidence.models[self.against]]
        return stats.interval([mine, theirs], stats.ratio_of_sums, bootstrap)
