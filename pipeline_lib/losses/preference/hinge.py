"""The hinge loss on the margin of log-ratios. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Hinge(PairLoss):
    """max(0, 1 - beta h), h the margin of log-ratios.

    Source: Zhao et al. 2023 (arXiv 2305.10425), on log-ratios as in Liu et al. 2023 (arXiv 2309.06657).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Scale of the margin: beyond 1 / beta nats a pair costs nothing."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        return (1 - self.beta * pairs.margin_B).clamp(min=0)
