"""Bootstrap intervals: deterministic, paired, of the right width; None where a figure is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate_metrics.distinct_n import DistinctN
from pipeline_lib.evaluation.stats import Bootstrap, interval
from pipeline_lib.schema import Interval
from tests.golden.check_gate import example

RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=60).tolist()


def bounds(found: Interval) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def width(found: Interval) -> float:
    low, high = bounds(found)
    return high - low


def test_deterministic_by_seed() -> None:
    first = interval([NOISE], stats.mean, Bootstrap())
    assert interval([NOISE], stats.mean, Bootstrap()) == first
    other = interval([NOISE], stats.mean, Bootstrap(seed=1))
    assert other.value == first.value
    assert bounds(other) != bounds(first)


def test_the_size_of_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = interval([NOISE], stats.mean, Bootstrap(resamples=500))
    monkeypatch.setattr(stats, "_MAX_CELLS", 60 * 7)
    assert interval([NOISE], stats.mean, Bootstrap(resamples=500)) == whole


def test_width_on_a_normal() -> None:
    """1.96 standard errors either way; 4 % is the noise of 20,000 resamples' quantiles, doubled."""
    found = interval([NOISE], stats.mean, Bootstrap(resamples=20_000))
    error = float(np.std(NOISE)) / math.sqrt(60)
    assert found.value == pytest.approx(float(np.mean(NOISE)), rel=1e-12)
    assert width(found) == pytest.approx(2 * 1.96 * error, rel=0.04)


def test_coverage_on_a_normal() -> None:
    """90 % intervals of 400 samples of 40 hold the true mean; percentile intervals are a little short."""
    rng = np.random.default_rng(1)
    found = [interval([rng.normal(3, 2, 40).tolist()], stats.mean, Bootstrap(resamples=400, confidence_frac=0.9))
             for _ in range(400)]  # fmt: skip
    covered = sum(low <= 3 <= high for low, high in map(bounds, found)) / 400
    assert 0.84 <= covered <= 0.93  # 3 standard errors are 4.5 points


def test_a_comparison_is_paired() -> None:
    """Both models share the prompts' difficulty, which a paired interval does not see."""
    better = [value + 0.1 for value in NOISE]
    paired = interval([better, NOISE], stats.difference_of_means, Bootstrap())
    assert bounds(paired) == pytest.approx((0.1, 0.1), rel=1e-9)
    shuffled = interval([better, NOISE[::-1]], stats.difference_of_means, Bootstrap())
    assert width(shuffled) > 0.3


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_missing_figure_anywhere_gives_nothing(bad: float | None) -> None:
    for columns in ([[1.0, bad]], [[1.0, 2.0], [bad, 2.0]]):
        found = interval(columns, stats.mean, Bootstrap())
        assert (found.value, found.low, found.high, found.num_examples) == (None, None, None, 2)


def test_a_statistic_that_is_not_finite_gives_nothing() -> None:
    with np.errstate(all="raise"):
        for columns in ([[1.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 1.0]], [[9e3, 9e3], [1.0, 1.0]]):
            statistic = stats.perplexity if columns[0][0] > 100 else stats.ratio_of_sums
            assert interval(columns, statistic, Bootstrap()).value is None
    assert interval([], stats.mean, Bootstrap()).value is None
    assert interval([[]], stats.mean, Bootstrap()).num_examples == 0


def test_one_example_has_no_spread() -> None:
    found = interval([[2.5]], stats.mean, Bootstrap())
    assert (found.value, found.low, found.high) == (2.5, 2.5, 2.5)


def test_two_examples_by_hand() -> None:
    """Resamples of (0, 1) have the means 0, 1/2, 1 with weights 1/4, 1/2, 1/4."""
    assert bounds(interval([[0.0, 1.0]], stats.mean, Bootstrap(confidence_frac=0.9))) == (0.0, 1.0)
    assert bounds(interval([[0.0, 1.0]], stats.mean, Bootstrap(confidence_frac=0.505))) != (0.0, 0.0)


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one length"):
        interval([[1.0, 2.0], [1.0]], stats.mean, Bootstrap())


def test_distinct_n_is_as_wide_as_its_sampling_error() -> None:
    """Each answer is one bigram, half of them their own: nearly a share of p = 1/2 of 100, so a
    standard error of 0.05. The quantiles of 200 halves are 10 % off, so 25 % are allowed.
    """
    rows = tuple(example(k, response="x x" if k % 2 else f"u{k} v{k}") for k in range(100))
    found = DistinctN().measure(Evidence({"dpo": rows}, {}), "dpo", bootstrap=Bootstrap())
    assert found.value == 0.51
    assert width(found) == pytest.approx(2 * 1.96 * 0.05, rel=0.25)


def test_one_answer_has_no_diversity() -> None:
    rows = (example(0, response="a b c"),)
    assert DistinctN().measure(Evidence({"dpo": rows}, {}), "dpo", bootstrap=Bootstrap()).value is None
