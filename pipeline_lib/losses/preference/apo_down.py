"""APO-down: both responses down, the rejected one further. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class ApoDown(PairLoss):
    """sigma(r_w) + 1 - sigma(r_w - r_l), r = beta times the log-ratio.

    For data whose chosen responses are worse than the model's own: the chosen one falls too.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        return (self.beta * pairs.chosen_ratio_B).sigmoid() + (-self.beta * pairs.margin_B).sigmoid()
