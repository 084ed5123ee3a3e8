"""Intervals over prompts by the bootstrap, deterministic by seed. Legend: N prompts, S resamples.

A prompt is the unit: resamples draw whole prompts, and both models of a comparison are drawn
together, so the comparison is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From columns drawn, `(columns, S, N)`, to one figure a resample, `(S,)`."""

_MAX_CELLS = 4_000_000


class Bootstrap(Frozen):
    """How intervals are computed."""

    resamples: int = Field(2000, ge=100, le=100_000)
    """Resamples of the prompts."""
    confidence_frac: float = Field(0.95, gt=0.5, lt=1)
    """Coverage of the two-sided interval."""
    seed: int = Field(0, ge=0)
    """Seed of the resampling."""


def interval(columns: Sequence[Sequence[float | None]], statistic: Statistic, bootstrap: Bootstrap) -> Interval:
    """Estimate a statistic of paired columns with a percentile bootstrap interval.

    Args:
        columns: One or more columns of N figures, a row a prompt.
        statistic: The figure, vectorised over resamples.
        bootstrap: Resamples, coverage and seed.

    Returns:
        The estimate; all None where a figure is missing or not finite, or N is 0.

    Raises:
        ValueError: The columns differ in length.

    Source: Efron and Tibshirani 1993, section 13.3.
    """
    num = len(columns[0]) if columns else 0
    if any(len(column) != num for column in columns):
        raise ValueError(f"paired columns must have one length, not {[len(column) for column in columns]}")
    missing = any(value is None or not math.isfinite(value) for column in columns for value in column)
    nothing = Interval(value=None, low=None, high=None, confidence_frac=bootstrap.confidence_frac, num_examples=num)
    if num == 0 or missing:
        return nothing
    table = np.array(columns, dtype=np.float64)
    with np.errstate(all="ignore"):
        point = float(statistic(table[:, None, :])[0])
    draws = _resampled(table, statistic, bootstrap)
    if not math.isfinite(point) or not bool(np.isfinite(draws).all()):
        return nothing
    tail = (1 - bootstrap.confidence_frac) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(
        value=point,
        low=float(low),
        high=float(high),
        confidence_frac=bootstrap.confidence_frac,
        num_examples=num,
    )


def _resampled(table: Array, statistic: Statistic, bootstrap: Bootstrap) -> Array:
    generator = np.random.Generator(np.random.PCG64(bootstrap.seed))
    num = table.shape[1]
    per_block = max(1, _MAX_CELLS // (num * table.shape[0]))
    draws: list[Array] = []
    done = 0
    while done < bootstrap.resamples:
        size = min(per_block, bootstrap.resamples - done)
        chosen = generator.integers(0, num, size=(size, num))
        with np.errstate(all="ignore"):
            draws.append(statistic(table[:, chosen]))
        done += size
    return np.concatenate(draws)


def mean(columns: Array) -> Array:
    """Mean of the first column."""
    result: Array = columns[0].mean(-1)
    return result


def difference_of_means(columns: Array) -> Array:
    """Mean of the first column less that of the second."""
    result: Array = (columns[0] - columns[1]).mean(-1)
    return result


def ratio_of_sums(columns: Array) -> Array:
    """Sum of the first column over that of the second."""
    result: Array = columns[0].sum(-1) / columns[1].sum(-1)
    return result


def perplexity(columns: Array) -> Array:
    """exp(sum of negative log-likelihoods / sum of tokens); columns nll, tokens."""
    result: Array = np.exp(columns[0].sum(-1) / columns[1].sum(-1))
    return result


def perplexity_ratio(columns: Array) -> Array:
    """Perplexity over another model's; columns nll, tokens, other nll, other tokens."""
    result: Array = np.exp(columns[0].sum(-1) / columns[1].sum(-1) - columns[2].sum(-1) / columns[3].sum(-1))
    return result


def win_rate(columns: Array) -> Array:
    """(wins + ties / 2) / N of the first column against the second, higher is better."""
    result: Array = ((columns[0] > columns[1]) + 0.5 * (columns[0] == columns[1])).mean(-1)
    return result


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of y on x; 0 where x does not vary."""
    xs, ys = np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)
    spread = float(((xs - xs.mean()) ** 2).sum()) if xs.size else 0.0
    return float(((xs - xs.mean()) * (ys - ys.mean())).sum() / spread) if spread else 0.0
