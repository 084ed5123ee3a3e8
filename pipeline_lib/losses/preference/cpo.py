"""CPO: DPO without the reference, and cross-entropy in its place. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import Form
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Cpo(Frozen):
    """-(1 - e) log sigma(beta d) - e log sigma(-beta d) + nll_coef NLL, d = lp_w - lp_l.

    NLL is the mean a token of the chosen text.

    Source: Xu et al. 2024 (arXiv 2401.08417).
    """

    form: ClassVar[Form] = "pair"
    needs_reference: ClassVar[bool] = False
    needs_target_kl: ClassVar[bool] = False
    beta: float = Field(0.1, gt=0)
    """Scale of the difference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels, e."""
    nll_coef: float = Field(1.0, ge=0)
    """Weight of the cross-entropy."""

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        scaled_B = self.beta * (pairs.chosen_B - pairs.rejected_B)
        loss_B = -(1 - self.label_smoothing) * logsigmoid(scaled_B) - self.label_smoothing * logsigmoid(-scaled_B)
        return loss_B + self.nll_coef * pairs.nll_per_token_B
