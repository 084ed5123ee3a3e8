"""RRHF: order the responses by mean log-probability, and learn the best.

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


class Rrhf(Frozen):
    """rank_coef sum over i better than j of max(0, p_j - p_i), less the log-probability of the best.

    p is the mean log-probability a token; the last term is a sum over the best response's tokens.
    Tied responses are not compared; where the best tie, the last term is their mean.

    Source: Yuan et al. 2023 (arXiv 2304.05302), eq. 2 to 4.
    """

    form: ClassVar[Form] = "list"
    needs_reference: ClassVar[bool] = False
    needs_target_kl: ClassVar[bool] = False
    rank_coef: float = Field(1.0, ge=0)
    """Weight of the ranking term; the authors' code has 100 as its default and runs with 1."""

    def of_list(self, ranked: RankedLogps) -> Tensor:
        """Return the loss of the list."""
        mean_K = ranked.mean_logp_K
        behind_KK = (mean_K[None, :] - mean_K[:, None]).clamp(min=0)
        return self.rank_coef * (behind_KK * ranked.is_better_KK).sum() - ranked.best_logp
