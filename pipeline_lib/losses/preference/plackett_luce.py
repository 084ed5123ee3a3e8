"""DPO on a ranked list: the Plackett-Luce likelihood of the order. Legend: K responses of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import ListLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import RankedLogps


class PlackettLuce(ListLoss):
    """-sum_k [s_k - logsumexp over j ranked k or later of s_j], s = beta times the log-ratio.

    Tied responses do not compete: each is chosen among itself and those strictly worse. With K = 2
    it is DPO's loss.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""

    def formula(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list without the SFT term."""
        score_K = self.beta * (ranked.logp_K - ranked.ref_logp_K)
        # Row k holds the scores that response k is chosen among, less its own.
        rivals_KK = (score_K[None, :] - score_K[:, None]).masked_fill(~ranked.is_better_KK, float("-inf"))
        rivals_KK = rivals_KK.diagonal_scatter(score_K.new_zeros(len(score_K)))
        return rivals_KK.logsumexp(-1).sum()
