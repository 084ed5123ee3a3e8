"""Best-of-n and pass@k against numbers worked by hand and against counting every subset."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from pipeline_lib.rl.best_of_n import expected_best, kl_nats, pass_at_k


def test_best_of_two_of_three_by_hand() -> None:
    # Subsets of {1, 2, 4}: {1,2} -> 2, {1,4} -> 4, {2,4} -> 4.
    assert expected_best([4.0, 1.0, 2.0], n=2) == pytest.approx(10 / 3, abs=1e-12)
    assert expected_best([4.0, 1.0, 2.0], n=1) == pytest.approx(7 / 3, abs=1e-12)
    assert expected_best([4.0, 1.0, 2.0], n=3) == 4.0


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_mean_over_all_subsets(n: int) -> None:
    scores = [0.3, -1.7, 2.5, 2.5, 0.0, -0.4, 9.1]
    every = [max(subset) for subset in combinations(scores, n)]
    assert expected_best(scores, n=n) == pytest.approx(sum(every) / len(every), abs=1e-12)


def test_large_numbers_of_samples_stay_exact() -> None:
    # Of the integers 1 to N the expected best of n is n (N + 1) / (n + 1).
    num_samples = 100_000
    for n in (1, 2, 500, num_samples - 1, num_samples):
        found = expected_best(range(1, num_samples + 1), n=n)
        assert found == pytest.approx(n * (num_samples + 1) / (n + 1), rel=1e-9)


def test_equal_scores_give_that_score() -> None:
    assert expected_best([0.25] * 1000, n=37) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("n", [0, 4, -1])
def test_more_than_there_are_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="1 <= n <= 3"):
        expected_best([1.0, 2.0, 3.0], n=n)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        expected_best([1.0, math.nan], n=1)


def test_kl_by_hand() -> None:
    assert kl_nats(1) == 0.0
    assert kl_nats(2) == pytest.approx(0.6931471805599453 - 0.5, abs=1e-15)
    assert kl_nats(16) == pytest.approx(2.772588722239781 - 0.9375, abs=1e-15)
    with pytest.raises(ValueError, match="n >= 1"):
        kl_nats(0)


def test_pass_at_k_by_hand() -> None:
    # 5 samples, 2 correct: 3 of the 10 pairs hold none of them.
    assert pass_at_k(5, 2, k=2) == pytest.approx(0.7, abs=1e-12)
    assert pass_at_k(5, 2, k=1) == pytest.approx(0.4, abs=1e-12)
    assert pass_at_k(5, 2, k=4) == 1.0  # only 3 are wrong
    assert pass_at_k(5, 0, k=5) == 0.0
    assert pass_at_k(5, 5, k=1) == 1.0


@pytest.mark.parametrize(("k", "correct"), [(0, 1), (6, 1), (1, 6), (1, -1)])
def test_counts_that_do_not_fit_are_refused(k: int, correct: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(5, correct, k=k)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_best_of_k_of_zeros_and_ones(k: int) -> None:
    assert pass_at_k(6, 2, k=k) == pytest.approx(expected_best([1, 1, 0, 0, 0, 0], n=k), abs=1e-12)
