"""PRO: each response against all worse ones, at temperatures out of rewards.

Legend: K responses of a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import Form
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import RankedLogps


class Pro(Frozen):
    """-sum_k log[exp(s_k / T_kk) / (exp(s_k / T_kk) + sum_i exp(s_i / T_ki))] + w (K - 1)^2 SFT.

    s is the mean log-probability a token, i runs over responses of lower reward than k,
    T_ki = 1 / (r_k - r_i) and T_kk = min_i T_ki. SFT = -(log-probability of the best response), a sum
    over tokens. The order is that of the rewards; responses of equal reward do not compete, as their
    temperature would be infinite. With K = 2 it is -log sigma((r_1 - r_2)(s_1 - s_2)) + w SFT.

    Source: Song et al. 2023 (arXiv 2306.17492).
    """

    form: ClassVar[Form] = "list"
    needs_reference: ClassVar[bool] = False
    needs_target_kl: ClassVar[bool] = False
    sft_weight: float = Field(0.05, ge=0)
    """w; multiplied by (K - 1)^2, as the ranking term grows with K."""

    def of_list(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list."""
        mean_K = ranked.mean_logp_K
        gap_KK = ranked.reward_K.to(mean_K.dtype)[:, None] - ranked.reward_K.to(mean_K.dtype)[None, :]
        # 1 / T: a product with the gap instead of a quotient stays finite where rewards tie.
        own_K = mean_K * gap_KK.amax(1).clamp(min=0)
        rivals_KK = (mean_K[None, :] * gap_KK - own_K[:, None]).masked_fill(gap_KK <= 0, float("-inf"))
        rivals_KK = rivals_KK.diagonal_scatter(own_K.new_zeros(len(own_K)))
        is_best_K = ranked.reward_K == ranked.reward_K.max()
        sft = -ranked.logp_K[is_best_K].mean()
        return rivals_KK.logsumexp(-1).sum() + self.sft_weight * (len(mean_K) - 1) ** 2 * sft
