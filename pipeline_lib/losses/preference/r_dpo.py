"""R-DPO: DPO with a margin for the difference of lengths. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class RDpo(PairLoss):
    """-log sigma(beta h - alpha (|y_w| - |y_l|)), h the margin of log-ratios, |y| tokens.

    With alpha below 0 a longer chosen response is pushed less, which holds lengths down. That is
    the paper's own case, which writes + alpha with alpha above 0.

    Source: Park et al. 2024 (arXiv 2403.19159).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    alpha: float = -0.01
    """Margin asked for each token that the chosen response is longer, in nats times beta."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        longer_B = (pairs.chosen_tokens_B - pairs.rejected_tokens_B).to(pairs.chosen_B.dtype)
        return -logsigmoid(self.beta * pairs.margin_B - self.alpha * longer_B)
