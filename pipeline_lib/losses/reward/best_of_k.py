"""Best of K: softmax cross-entropy on the preferred response. Legend: K responses of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline_lib.losses.reward.contract import check
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor


class BestOfK(Frozen):
    """-sum_i q_i log softmax(r)_i; a step is divided by its prompts.

    q is 1 on the best response, shared equally where several tie for it, and with label smoothing e
    (1 - e) of that plus e / K. The order of the others does not matter.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 1, with K = 4.
    """

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all K responses."""
    centring: float = Field(0.0, ge=0)
    """Weight of (2 * mean score)^2, with K = 2 (better + worse)^2, which keeps scores around 0."""

    def of_prompt(
        self, scores_K: Tensor, rank_K: Tensor, *, strength: str | None = None, weight: float = 1.0
    ) -> tuple[Tensor, float]:
        """Return the prompt's weighted loss, and its weight; 0 where all tie. The strength has no part in it.

        Raises:
            ValueError: The shapes do not fit.
        """
        del strength
        check(scores_K, rank_K)
        is_best_K = rank_K == rank_K.min()
        if bool(is_best_K.all()):
            return scores_K.sum() * 0, 0.0
        target_K = is_best_K.to(scores_K.dtype) / is_best_K.sum()
        target_K = (1 - self.label_smoothing) * target_K + self.label_smoothing / len(scores_K)
        loss = -(target_K * scores_K.log_softmax(-1)).sum()
        if self.centring:
            loss = loss + self.centring * (2 * scores_K.mean()).square()
        return weight * loss, weight
