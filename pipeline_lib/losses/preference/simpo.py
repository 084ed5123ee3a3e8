"""SimPO: the policy's own mean log-probability as the reward, no reference. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class SimPo(PairLoss):
    """-log sigma(beta (lp_w / |y_w| - lp_l / |y_l|) - gamma).

    gamma is the margin itself, not its ratio to beta.

    Source: Meng et al. 2024 (arXiv 2405.14734), eq. 6.
    """

    needs_reference: ClassVar[bool] = False
    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-probabilities."""
    gamma: float = Field(0.5, ge=0)
    """Margin by which the chosen response must lead."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        mean_B = pairs.chosen_B / pairs.chosen_tokens_B - pairs.rejected_B / pairs.rejected_tokens_B
        return -logsigmoid(self.beta * mean_B - self.gamma)
