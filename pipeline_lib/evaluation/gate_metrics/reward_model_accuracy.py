"""Reliability of the judge: accuracy of the reward model on held-out comparisons."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import ClassVar

from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class RewardModelAccuracy(Frozen):
    """Share of held-out pairs whose better response scores strictly higher, Wilson's interval.

    Source: Wilson 1927.
    """

    unit: ClassVar[str] = "fraction"
    against: None = None
    """Not used: the judge is the same for every candidate."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: Bootstrap) -> Interval:  # noqa: ARG002
        """Return the accuracy with its interval over pairs."""
        accuracy = evidence.reward_model.get("test_accuracy_frac")
        pairs = evidence.reward_model.get("test_pairs")
        confidence = bootstrap.confidence_frac
        if accuracy is None or pairs is None or not (0 <= accuracy <= 1) or not (1 <= pairs < math.inf):
            return Interval(value=None, low=None, high=None, confidence_frac=confidence, num_examples=0)
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        centre = (accuracy + z * z / (2 * pairs)) / (1 + z * z / pairs)
        half = z * math.sqrt(accuracy * (1 - accuracy) / pairs + (z / (2 * pairs)) ** 2) / (1 + z * z / pairs)
        return Interval(
            value=accuracy, low=max(0.0, centre - half), high=min(1.0, centre + half),
            confidence_frac=confidence, num_examples=int(pairs),
        )  # fmt: skip
