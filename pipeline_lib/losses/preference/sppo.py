"""SPPO with hard labels: self-play towards a fixed log-ratio. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Sppo(PairLoss):
    """(c_w - 1 / (2 beta))^2 + (c_l + 1 / (2 beta))^2, c the log-ratios.

    Source: Wu et al. 2024 (arXiv 2405.00675), with win rates 1 and 0.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference: log-ratios aim at 1 / (2 beta) and its negative."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        target = 1 / (2 * self.beta)
        return (pairs.chosen_ratio_B - target).square() + (pairs.rejected_ratio_B + target).square()
