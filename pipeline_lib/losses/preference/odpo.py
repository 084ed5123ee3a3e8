"""ODPO: DPO with an offset that grows with how much better the chosen response is. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Odpo(PairLoss):
    """-log sigma(beta h - offset), h the margin of log-ratios; offset = alpha f(reward gap).

    Pairs without rewards have the fixed offset. With f = log a pair whose rewards do not favour the
    chosen response has the limit of a gap of 0: the offset is -infinity, and it costs nothing.

    Source: Amini et al. 2024 (arXiv 2402.10571).
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    alpha: float = Field(1.0, ge=0)
    """Scale of the offset out of rewards."""
    scaling: Literal["log", "identity"] = "log"
    """f."""
    offset: float = 0.0
    """Offset of pairs whose rows carry no rewards; 0 is DPO."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        return -logsigmoid(self.beta * pairs.margin_B - self._offset(pairs))

    def _offset(self, pairs: PairLogps) -> Tensor | float:
        if pairs.reward_gap_B is None:
            return self.offset
        gap_B = pairs.reward_gap_B.to(pairs.chosen_B.dtype)
        if not self.alpha:
            scaled_B = gap_B * 0
        elif self.scaling == "log":
            scaled_B = self.alpha * gap_B.clamp(min=0).log()
        else:
            scaled_B = self.alpha * gap_B
        return scaled_B.where(~gap_B.isnan(), self.offset)
