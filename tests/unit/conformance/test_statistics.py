"""Intervals, report card and win rates against scipy and scikit-learn."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import brier_score_loss, roc_auc_score

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.evaluation.report_card import ReportCard, ScoredRow, report_card
from pipeline_lib.evaluation.stats import Bootstrap


def rows(seed: int, *, num: int = 30) -> list[ScoredRow]:
    draw = random.Random(seed)
    made = []
    for _ in range(num):
        count = draw.choice([2, 2, 3])
        ranks = [draw.randint(1, 2) for _ in range(count)]
        ranks[0] = 3 - ranks[1]
        scores = tuple(round(2 * draw.gauss(-rank, 1.5)) / 2 for rank in ranks)  # rounded, so that some tie
        words = tuple(float(draw.randint(1, 30)) for _ in ranks)
        made.append(ScoredRow(scores=scores, ranks=tuple(ranks), lengths_words=words))
    return made


def pairs(given: list[ScoredRow]) -> list[tuple[float, float]]:
    """(better, worse) scores of every pair."""
    return [
        (row.scores[i], row.scores[j])
        for row in given
        for i, a in enumerate(row.ranks)
        for j, b in enumerate(row.ranks)
        if a < b
    ]


@pytest.fixture(scope="module", params=[0, 1, 2])
def card(request: pytest.FixtureRequest) -> tuple[ReportCard, list[tuple[float, float]]]:
    given = rows(request.param)
    return report_card(given, Bootstrap(resamples=100)), pairs(given)


def test_accuracy_is_strict(card: tuple[ReportCard, list[tuple[float, float]]]) -> None:
    found, compared = card
    assert any(a == b for a, b in compared)
    expected = sum(a > b for a, b in compared) / len(compared)
    assert found.figures["test_accuracy_frac"] == pytest.approx(expected, rel=1e-12)


def test_auc(card: tuple[ReportCard, list[tuple[float, float]]]) -> None:
    found, compared = card
    better, worse = zip(*compared, strict=True)
    expected = roc_auc_score([1] * len(better) + [0] * len(worse), [*better, *worse])
    assert found.figures["test_auc_frac"] == pytest.approx(expected, rel=1e-9)


def test_brier(card: tuple[ReportCard, list[tuple[float, float]]]) -> None:
    found, compared = card
    probability = [1 / (1 + math.exp(b - a)) for a, b in compared]
    expected = brier_score_loss([1] * len(compared), probability)
    assert found.figures["test_brier"] == pytest.approx(expected, rel=1e-9)


def test_calibration_error_by_loop(card: tuple[ReportCard, list[tuple[float, float]]]) -> None:
    found, compared = card
    bins: dict[int, list[tuple[float, float]]] = {}
    for a, b in compared:
        confidence = 1 / (1 + math.exp(-abs(a - b)))
        right = 1.0 if a > b else 0.5 if a == b else 0.0
        bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append((confidence, right))
    error = sum(abs(sum(c - right for c, right in members)) for members in bins.values()) / len(compared)
    assert found.figures["test_calibration_error_frac"] == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(("right", "total"), [(0, 12), (1, 12), (7, 12), (12, 12), (130, 200)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilsons_interval(right: int, total: int, confidence: float) -> None:
    judge = {"test_accuracy_frac": right / total, "test_pairs": float(total)}
    metric = GATE_METRICS.build({"name": "reward_model_accuracy"})
    found = metric.measure(Evidence({}, judge), "any", bootstrap=Bootstrap(confidence_frac=confidence))
    expected = binomtest(right, total).proportion_ci(confidence_level=confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-12)


def test_the_bootstrap_agrees_with_scipys() -> None:
    """Two samplers, one distribution: bounds within a tenth of the interval's width of each other."""
    draw = random.Random(0)
    mine, theirs = ([draw.gauss(shift, 1) for _ in range(80)] for shift in (0.3, 0.0))
    found = stats.interval([mine, theirs], stats.difference_of_means, Bootstrap(resamples=4000))
    expected = bootstrap(
        (mine, theirs), lambda a, b, axis=-1: (a - b).mean(axis), paired=True, method="percentile",
        n_resamples=4000, rng=np.random.default_rng(1), vectorized=True,
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(sum(mine) / 80 - sum(theirs) / 80, rel=1e-9)
    assert found.low is not None
    assert found.high is not None
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=width / 10)
    assert found.high == pytest.approx(expected.high, abs=width / 10)


def test_win_rate_counts_a_tie_as_half() -> None:
    columns = np.array([[1.0, 2.0, 3.0, 0.0], [1.0, 0.0, 4.0, -1.0]])[:, None, :]
    assert stats.win_rate(columns).tolist() == [(2 + 0.5) / 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_figure_that_is_missing_is_no_figure(bad: float | None) -> None:
    found = stats.interval([[1.0, bad]], stats.mean, Bootstrap(resamples=100))
    assert (found.value, found.low, found.high) == (None, None, None)
