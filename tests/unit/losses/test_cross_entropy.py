"""Weights and divisors of every reduction, by hand."""

from __future__ import annotations

import pytest

from pipeline_lib.losses.cross_entropy import CrossEntropy, Reduction

TURNS = (3, 5)


@pytest.mark.parametrize(
    ("reduction", "weights", "divisor"),
    [
        ("token_mean", [0.5, 0.5], 4.0),
        ("sample_mean", [0.0625, 0.0625], 0.5),
        ("turn_mean", [0.5 / 3, 0.1], 1.0),
        ("sum", [0.5, 0.5], 4.0),
    ],
)
def test_weights_of_a_row_by_hand(reduction: Reduction, weights: list[float], divisor: float) -> None:
    objective = CrossEntropy(reduction=reduction)
    assert objective.turn_weights(TURNS, row_weight=0.5) == pytest.approx(weights, abs=1e-15)
    assert objective.divisor(TURNS, row_weight=0.5) == divisor
    # The divisor is the sum of the weights of all tokens, whatever the reduction.
    summed = sum(weight * count for weight, count in zip(weights, TURNS, strict=True))
    assert summed == pytest.approx(divisor, abs=1e-15)


def test_a_row_without_tokens_weighs_nothing() -> None:
    for reduction in ("token_mean", "sample_mean", "turn_mean"):
        objective = CrossEntropy(reduction=reduction)
        assert objective.divisor((), row_weight=1.0) == 0.0
        assert objective.turn_weights((), row_weight=1.0) == []
