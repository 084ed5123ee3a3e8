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

    def __post_init__(self) -> None:
        """Refuse shapes that would mix pairs by broadcasting.

        Raises:
            ValueError: The tensors are not all `(B,)`.
        """
        shapes = {name: tuple(values.shape) for name, values in vars(self).items()}
        if len(set(shapes.values())) != 1 or self.chosen_B.ndim != 1:
            raise ValueError(f"every tensor of the pairs must be (B,), not {shapes}")

    @property
    def margin_B(self) -> Tensor:
        """The margin of log-ratios, (logp_w - ref_w) - (logp_l - ref_l), with gradient."""
        return (self.chosen_B - self.ref_chosen_B) - (self.rejected_B - self.ref_rejected_B)


class PreferenceLoss(Protocol):
    """A frozen class whose fields are the loss's parameters."""

    def per_pair(self, pairs: PairLogps) -> Tensor:
        """Return the loss of each pair, `(B,)`; pairs do not mix."""
