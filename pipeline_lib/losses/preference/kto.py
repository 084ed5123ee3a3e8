"""KTO: single responses, desirable or not, against a reference point.

Legend: B responses, M mismatched prompt-response pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import UnpairedLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import UnpairedLogps


class Kto(UnpairedLoss):
    """lambda_d (1 - sigma(beta (c - z0))) if desirable, else lambda_u (1 - sigma(beta (z0 - c))).

    c is the log-ratio, z0 = max(0, mean of the M mismatched log-ratios) the estimate of
    KL(policy || reference): a plain mean, without gradient; 0 where M is 0.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    lambda_d: float = Field(1.0, ge=0)
    """Weight of desirable responses."""
    lambda_u: float = Field(1.0, ge=0)
    """Weight of undesirable ones; lambda_d n_d / (lambda_u n_u) of 1 to 4/3 balances numbers apart."""

    def formula(self, unpaired: UnpairedLogps) -> Tensor:
        """Return the loss of each response without the SFT term."""
        beyond_B = unpaired.logp_B - unpaired.ref_logp_B - self._reference_point(unpaired)
        # sigma(-x) is 1 - sigma(x) without the loss of digits.
        desirable_B = self.lambda_d * (-self.beta * beyond_B).sigmoid()
        undesirable_B = self.lambda_u * (self.beta * beyond_B).sigmoid()
        return desirable_B.where(unpaired.is_desirable_B, undesirable_B)

    def _reference_point(self, unpaired: UnpairedLogps) -> Tensor | float:
        if not unpaired.kl_logp_M.numel():
            return 0.0
        return (unpaired.kl_logp_M - unpaired.kl_ref_logp_M).detach().mean().clamp(min=0)
