"""Perplexity of the reference answers."""

from __future__ import annotations

from typing import ClassVar

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class Perplexity(Frozen):
    """exp of the mean negative log-likelihood a token, or its ratio to another model's (below 1 is better)."""

    unit: ClassVar[str] = "nats, exponentiated"
    against: str | None = None
    """A model of the run: the ratio to it; null: the figure itself."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval over prompts."""
        mine = _columns(evidence, candidate)
        if self.against is None:
            return stats.interval(mine, stats.perplexity, bootstrap)
        theirs = _columns(evidence, self.against)
        return stats.interval([*mine, *theirs], stats.perplexity_ratio, bootstrap)


def _columns(evidence: Evidence, model: str) -> list[list[float | None]]:
    rows = evidence.models[model]
    return [[row.reference_nll_nats for row in rows], [float(row.reference_tokens) for row in rows]]
