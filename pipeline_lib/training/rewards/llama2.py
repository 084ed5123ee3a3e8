"""LLaMA-2's reward: a helpful and a safety reward model, combined piecewise and whitened."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen

WHITEN_EPSILON = 1e-8
"""Added to the variance, as in `rl.advantage.whiten`."""


class Llama2(Frozen):
    """R = WHITEN(r_s where the prompt asks for safety or sigma(r_s) < threshold, else r_h), r the raw logits.

    Safety rules where it is at stake, or where the safety model finds the response unsafe; elsewhere
    helpfulness does. The paper takes LOGIT of the models' sigmoids; raw outputs are these logits, without
    the infinities. The strict comparison is made on them: r_s < log(threshold / (1 - threshold)).

    Source: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.3, eq. 3 and 4.
    """

    helpful: str = Field("reward", min_length=1)
    """The helpful reward model: `reward` for the main one, else a name of `reward_models`."""
    safe: str = Field("safe", min_length=1)
    """The safety reward model."""
    threshold_frac: float = Field(0.15, gt=0, lt=1)
    """Below this probability of being safe a response is scored by the safety model."""
    safety_tags: tuple[str, ...] = Field(("safe",), min_length=1)
    """Prompts of rows with one of these tags are scored by the safety model."""
    whiten: bool = True
    """Shift and scale the iteration's scores to mean 0 and variance 1 (divided by n)."""

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The two models that it asks."""
        return (self.helpful, self.safe)

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the combined score of each response, whitened over all of them."""
        trees = [sample.tree for sample in samples]
        helpful = resources.scores_of(self.helpful, trees, is_raw=True)
        safe = resources.scores_of(self.safe, trees, is_raw=True)
        asks = [not set(self.safety_tags).isdisjoint(sample.tags) for sample in samples]
        by_safety = is_by_safety(safe, asks, threshold_frac=self.threshold_frac)
        combined = [s if is_safety else h for s, h, is_safety in zip(safe, helpful, by_safety, strict=True)]
        resources.on_figure("safe_logit", sum(safe) / len(safe))
        resources.on_figure("helpful_logit", sum(helpful) / len(helpful))
        resources.on_figure("by_safety_frac", sum(by_safety) / len(by_safety))
        return whitened(combined) if self.whiten else combined


def is_by_safety(safe: Sequence[float], asks_for_safety: Sequence[bool], *, threshold_frac: float) -> list[bool]:
    """Tell which responses the safety model scores.

    Args:
        safe: The safety model's raw outputs.
        asks_for_safety: True where the prompt is tagged as one that might draw an unsafe response.
        threshold_frac: Below this probability, strictly, the safety model decides.

    Source: Touvron et al. 2023, eq. 3.
    """
    threshold = math.log(threshold_frac / (1 - threshold_frac))
    return [asks or logit < threshold for logit, asks in zip(safe, asks_for_safety, strict=True)]


def whitened(values: Sequence[float]) -> list[float]:
    """Return (x - mean) / sqrt(var + 1e-8), the variance divided by n; no list at all stays none."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + WHITEN_EPSILON) for value in values]
