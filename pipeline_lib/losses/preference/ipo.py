"""IPO, on sums or on means a token. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Ipo(PairLoss):
    """(h - 1 / (2 tau))^2, h the margin of log-ratios; or of log-ratios a token.

    Source: Azar et al. 2023 (arXiv 2310.12036), eq. 17.
    """

    needs_reference: ClassVar[bool] = True
    tau: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference: the margin aimed at is 1 / (2 tau)."""
    reduction: Literal["sum", "mean"] = "sum"
    """sum: log-ratios of whole responses, as in the paper. mean: divided by their tokens."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        margin_B = pairs.margin_B if self.reduction == "sum" else pairs.margin_per_token_B
        return (margin_B - 1 / (2 * self.tau)).square()
