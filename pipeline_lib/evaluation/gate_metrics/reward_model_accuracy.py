"""Reliability of the judge: accuracy of the reward model on held-out comparisons."""

from __future__ import annotations

import math
from typing import ClassVar

from scipy.stats import binomtest

from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class RewardModelAccuracy(Frozen):
    """Share of held-out pairs whose better response scores strictly higher, Wilson's interval."""

    unit: ClassVar[str] = "fraction"
    against: None = None
    """Not used: the judge is the same for every candidate."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: Bootstrap) -> Interval:  # noqa: ARG002
        """Return the accuracy with its interval over pairs."""
        accuracy = evidence.reward_model.get("test_accuracy_frac")
        pairs = evidence.reward_model.get("test_pairs")
        if accuracy is None or pairs is None or not math.isfinite(accuracy) or pairs < 1:
            return Interval(value=None, low=None, high=None, confidence_frac=bootstrap.confidence_frac, num_examples=0)
        found = binomtest(round(accuracy * pairs), int(pairs)).proportion_ci(
            confidence_level=bootstrap.confidence_frac, method="wilson"
        )
        return Interval(
            value=accuracy, low=float(found.low), high=float(found.high),
            confidence_frac=bootstrap.confidence_frac, num_examples=int(pairs),
        )  # fmt: skip
