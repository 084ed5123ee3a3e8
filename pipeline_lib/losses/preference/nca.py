"""NCA: noise-contrastive alignment of pairs. Legend: B pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipeline_lib.losses.preference.contract import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.losses.preference.contract import PairLogps


class Nca(PairLoss):
    """-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2, r = beta times the log-ratio.

    It bounds the chosen response's own log-ratio, which DPO lets fall with the rejected one's.

    Source: Chen et al. 2024 (arXiv 2402.05369), with K = 2.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""

    def formula(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair without the SFT term."""
        from torch.nn.functional import logsigmoid  # noqa: PLC0415  (configuration needs no torch)

        chosen_B, rejected_B = self.beta * pairs.chosen_ratio_B, self.beta * pairs.rejected_ratio_B
        return -logsigmoid(chosen_B) - 0.5 * (logsigmoid(-chosen_B) + logsigmoid(-rejected_B))
