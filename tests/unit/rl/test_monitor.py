"""Figures of a policy's health, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.rl.monitor import (
    distinct_frac,
    duplicates_frac,
    explained_variance,
    repeated_frac,
    slope,
    truncated_length,
)

RESPONSES = [[1, 2, 1, 2], [1, 2], [3]]


def test_distinct_pieces_by_hand() -> None:
    assert distinct_frac(RESPONSES, 1) == 3 / 7
    assert distinct_frac(RESPONSES, 2) == 2 / 4  # 12 21 12 | 12; none goes from one response into the next
    assert distinct_frac([[3]], 2) == 1.0


def test_repetition_is_counted_within_each_response() -> None:
    assert repeated_frac(RESPONSES, 2) == pytest.approx((1 / 3 + 0 + 0) / 3, rel=1e-12)
    assert repeated_frac([[5] * 12], 3) == pytest.approx(0.9, rel=1e-12)  # 10 pieces, one of them new
    assert repeated_frac([[1, 2, 3]] * 4, 3) == 0.0


def test_duplicates_are_counted_among_responses() -> None:
    assert duplicates_frac([[1], [2], [1], [1]]) == 0.5
    assert duplicates_frac(RESPONSES) == 0.0


def test_the_slope_is_that_of_least_squares() -> None:
    x, y = torch.tensor([1, 2, 4]), torch.tensor([0.0, 1.0, 2.0])
    assert slope(x, y) == pytest.approx(9 / 14, rel=1e-12)  # about the means 7/3 and 1: 3 over 14/3
    assert slope(torch.tensor([3, 3]), torch.tensor([0.0, 5.0])) == 0.0


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 7, returns) == 1.0  # a constant apart explains as much
    assert explained_variance(torch.zeros(3), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0, rel=1e-12)
    assert explained_variance(returns, torch.ones(3)) == 0.0


@pytest.mark.parametrize(("after", "expected"), [(0, 2), (1, 2), (2, 5), (4, 5), (5, None), (9, None)])
def test_a_response_ends_at_the_first_such_token_past_a_place(after: int, expected: int | None) -> None:
    assert truncated_length([7, 13, 7, 7, 13, 7], 13, after=after) == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must be one shape"):
        slope(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="must be one shape"):
        explained_variance(torch.zeros(2), torch.zeros(3))
