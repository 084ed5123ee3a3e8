"""EXO: the reverse KL from smoothed labels, on pairs. Legend: B pairs."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Exo(PairLoss):
    """sigma(x) (log sigma(x) - log(1 - e)) + sigma(-x) (log sigma(-x) - log e), x = beta h.

    h is the margin of log-ratios. With s = sigma(x) it is KL((s, 1 - s) || (1 - e, e)).

    Source: Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(1e-3, gt=0, lt=0.5)
    """e, the probability that labels give the rejected response; without it the divergence is infinite."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        scaled_B, e = self.beta * pairs.margin_B, self.label_smoothing
        won_B = scaled_B.sigmoid() * (logsigmoid(scaled_B) - log(1 - e))
        return won_B + (-scaled_B).sigmoid() * (logsigmoid(-scaled_B) - log(e))
