"""Plackett-Luce: the likelihood of a whole ranking. Legend: K responses of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline_lib.losses.reward.contract import check
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor


class PlackettLuce(Frozen):
    """-sum_k [r_k - logsumexp over j ranked k or later of r_j]; a step is divided by its prompts.

    Tied responses do not compete: each is chosen among itself and those strictly worse. With K = 2
    it is Bradley-Terry.

    Source: Plackett 1975; Luce 1959.
    """

    centring: float = Field(0.0, ge=0)
    """Weight of the mean over (better, worse) pairs of (better + worse)^2, which keeps scores around 0."""

    def of_prompt(
        self, scores_K: Tensor, rank_K: Tensor, *, strength: str | None = None, weight: float = 1.0
    ) -> tuple[Tensor, float]:
        """Return the prompt's weighted loss, and its weight; 0 where all tie. The strength has no part in it.

        Raises:
            ValueError: The shapes do not fit.
        """
        del strength
        check(scores_K, rank_K)
        is_better_KK = rank_K[:, None] < rank_K[None, :]
        rivals_KK = (scores_K[None, :] - scores_K[:, None]).masked_fill(~is_better_KK, float("-inf"))
        loss = rivals_KK.diagonal_scatter(scores_K.new_zeros(len(scores_K))).logsumexp(-1).sum()
        pairs = int(is_better_KK.sum())
        if self.centring:
            both_KK = (scores_K[:, None] + scores_K[None, :]).square() * is_better_KK
            loss = loss + self.centring * both_KK.sum() / max(1, pairs)
        return weight * loss, weight if pairs else 0.0
