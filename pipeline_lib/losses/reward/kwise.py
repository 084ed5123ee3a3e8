"""K-wise comparisons: all pairs of a prompt as one element. Legend: K responses of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline_lib.losses.reward.contract import PairTerms

if TYPE_CHECKING:
    from torch import Tensor


class KWise(PairTerms):
    """-1 / C(K, 2) sum over (better, worse) of log sigma(better - worse); a step is divided by its prompts.

    Ties are dropped from the sum. With K = 2 it is Bradley-Terry.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), eq. 1.
    """

    divisor: Literal["all", "valid"] = "all"
    """all: C(K, 2) as printed, ties included. valid: the pairs that are left without ties."""

    def of_prompt(
        self, scores_K: Tensor, rank_K: Tensor, *, strength: str | None = None, weight: float = 1.0
    ) -> tuple[Tensor, float]:
        """Return the prompt's weighted loss, and its weight; with `valid`, prompts of ties alone have none.

        Raises:
            ValueError: The shapes do not fit, or the strength is unknown.
        """
        loss_P = self.of_ranks(scores_K, rank_K, strength)
        responses = len(scores_K)
        pairs = responses * (responses - 1) // 2 if self.divisor == "all" else len(loss_P)
        return weight * loss_P.sum() / max(1, pairs), weight if pairs else 0.0
