"""What a preference loss is: one value a pair out of sequence log-probabilities. Legend: B pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of B pairs, summed over response tokens, end-of-turn token included."""

    chosen_B: Tensor
    """Under the policy; carries the gradient."""
    rejected_B: Tensor
    ref_chosen_B: Tensor
    """Under the reference."""
    ref_rejected_B: Tensor
    chosen_tokens_B: Tensor
    """Response tokens, for losses that take means."""
    rejected_tokens_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        """H = (logp_w - ref_w) - (logp_l - ref_l)."""
        return (self.chosen_B - self.ref_chosen_B) - (self.rejected_B - self.ref_rejected_B)


class PreferenceLoss(Protocol):
    """A frozen class whose fields are the loss's parameters."""

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair, `(B,)`; pairs do not mix."""
