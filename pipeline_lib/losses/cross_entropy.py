"""Weighted cross-entropy of language-model tokens: one formula for all of SFT's reductions.

L = sum_t w_t nll_t / sum_t w_t over an optimizer step, where the reduction says what w_t is: the row's
weight (token mean), divided by the row's counted tokens (sample mean) or by those of its turn (turn
mean). `sum` has no divisor. nll_t is smoothed by `losses.tokens.smoothed_nll`. Both sums run over all
of a step's micro-batches, so accumulation is exact.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_lib.validation import Frozen

Reduction = Literal["token_mean", "sample_mean", "turn_mean", "sum"]


class CrossEntropy(Frozen):
    """Cross-entropy of the counted tokens."""

    reduction: Reduction = "token_mean"
    """Every token counts alike over the whole step, every row, every turn; sum: no divisor at all."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over the vocabulary."""

    def turn_weights(self, turn_tokens: tuple[int, ...], *, row_weight: float) -> list[float]:
        """Return the weight of each token of a row's turns, one number a turn.

        Args:
            turn_tokens: Counted tokens of each turn.
            row_weight: The row's own weight.
        """
        match self.reduction:
            case "sample_mean":
                return [row_weight / max(1, sum(turn_tokens))] * len(turn_tokens)
            case "turn_mean":
                return [row_weight / count for count in turn_tokens]
            case _:
                return [row_weight] * len(turn_tokens)

    def divisor(self, turn_tokens: tuple[int, ...], *, row_weight: float) -> float:
        """Return what a row adds to the divisor of its step: the sum of its tokens' weights."""
        match self.reduction:
            case "sample_mean":
                return row_weight if turn_tokens else 0.0
            case "turn_mean":
                return row_weight * len(turn_tokens)
            case _:
                return row_weight * sum(turn_tokens)
