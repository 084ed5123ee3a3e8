"""Bradley-Terry strengths against a closed form and against a general optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from pipeline_lib.evaluation.ratings import bradley_terry_strengths


def test_two_models_in_closed_form() -> None:
    """9 wins of 12 are a probability of 3/4: strengths 3 to 1, with a product of 1."""
    strength = bradley_terry_strengths([[0, 9], [3, 0]])
    assert strength == pytest.approx([3**0.5, 3**-0.5], rel=1e-9)
    assert strength[0] / strength.sum() == pytest.approx(0.75, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_maximum_of_the_likelihood(seed: int) -> None:
    generator = np.random.default_rng(seed)
    wins = generator.integers(1, 12, size=(4, 4)) / 2.0
    np.fill_diagonal(wins, 0.0)

    def negative_log_likelihood(rating: np.ndarray) -> float:
        apart = rating[:, None] - rating[None, :]
        return float((wins * np.logaddexp(0.0, -apart)).sum()) + float(rating.mean() ** 2)

    expected = minimize(negative_log_likelihood, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    found = np.log(bradley_terry_strengths(wins))
    assert found.sum() == pytest.approx(0.0, abs=1e-9)
    assert found == pytest.approx(expected - expected.mean(), abs=1e-5)


def test_equal_models_are_equal() -> None:
    assert bradley_terry_strengths(3 * (np.ones((3, 3)) - np.eye(3))) == pytest.approx(np.ones(3), rel=1e-12)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0, 2], [0, 0]], "never lost"),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], "never compared"),
        ([[1, 1], [1, 0]], "against itself"),
        ([[0, -1], [1, 0]], "not below 0"),
        ([[0, 1, 2]], "must be"),
    ],
)
def test_what_has_no_strengths(wins: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bradley_terry_strengths(wins)
