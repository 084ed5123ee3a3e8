"""Robust DPO: unbiased under a known rate of flipped labels. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Robust(PairLoss):
    """(-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2e), h the margin of log-ratios.

    Over labels flipped with probability e its mean is DPO's loss on the true labels; so single
    values may be below 0.

    Source: Chowdhury et al. 2024 (arXiv 2403.00409).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.1, ge=0, lt=0.5)
    """Share of flipped labels, e."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        scaled_B, flipped = self.beta * pairs.margin_B, self.label_smoothing
        unscaled_B = -(1 - flipped) * logsigmoid(scaled_B) + flipped * logsigmoid(-scaled_B)
        return unscaled_B / (1 - 2 * flipped)
