"""DPO, and with label smoothing cDPO. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Dpo(PairLoss):
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h), h the margin of log-ratios.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; Mitchell 2023 (cDPO), eq. 3.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels, e."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        scaled_B = self.beta * pairs.margin_B
        return -(1 - self.label_smoothing) * logsigmoid(scaled_B) - self.label_smoothing * logsigmoid(-scaled_B)
