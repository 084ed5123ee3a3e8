"""APO-zero: chosen up and rejected down, each against the reference. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class ApoZero(PairLoss):
    """1 - sigma(r_w) + sigma(r_l), r = beta times the log-ratio.

    For data whose chosen responses are better than the model's own.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        # sigma(-x) is 1 - sigma(x) without the loss of digits.
        return (-self.beta * pairs.chosen_ratio_B).sigmoid() + (self.beta * pairs.rejected_ratio_B).sigmoid()
