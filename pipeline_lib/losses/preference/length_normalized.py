"""DPO on log-ratios a token. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class LengthNormalized(PairLoss):
    """-log sigma(beta (c_w / |y_w| - c_l / |y_l|)), c the log-ratios.

    Source: Lambert et al. 2024 (Tulu 3, arXiv 2411.15124).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(5.0, gt=0)
    """Scale; larger than DPO's, as log-ratios a token are smaller than sums."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        return -logsigmoid(self.beta * pairs.margin_per_token_B)
