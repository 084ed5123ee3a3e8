"""KL from the reference model."""

from __future__ import annotations

from typing import ClassVar

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class Kl(Frozen):
    """Mean of log pi - log pi_ref over the answers: exact in expectation at temperature 1."""

    unit: ClassVar[str] = "nats a response"
    against: None = None
    """Not used: the reference is always the SFT model."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval over prompts."""
        rows = evidence.models[candidate]
        columns = [[row.logp for row in rows], [row.reference_model_logp for row in rows]]
        return stats.interval(columns, stats.difference_of_means, bootstrap)
