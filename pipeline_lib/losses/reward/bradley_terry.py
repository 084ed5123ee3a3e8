"""Bradley-Terry: every (better, worse) pair counts once. Legend: K responses of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.losses.reward.contract import PairTerms

if TYPE_CHECKING:
    from torch import Tensor


class BradleyTerry(PairTerms):
    """-log sigma(better - worse - margin) of each pair; a step is divided by its number of pairs.

    Source: Bradley and Terry 1952; Touvron et al. 2023 (arXiv 2307.09288), eq. 2.
    """

    def of_prompt(
        self, scores_K: Tensor, rank_K: Tensor, *, strength: str | None = None, weight: float = 1.0
    ) -> tuple[Tensor, float]:
        """Return the weighted sum over the prompt's pairs, and its weighted number of pairs.

        Raises:
            ValueError: The shapes do not fit, or the strength is unknown.
        """
        loss_P = self.of_ranks(scores_K, rank_K, strength)
        return weight * loss_P.sum(), weight * len(loss_P)
