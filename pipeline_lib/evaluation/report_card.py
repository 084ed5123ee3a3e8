"""The reward model's report card on held-out comparisons: how right, how sure, how biased it is.

Legend: N rows, P pairs (better, worse), S resamples. Scores are raw. A margin is the better
response's score less the worse one's; sigma(margin) is the probability that the model gives to the
better one (Bradley-Terry). Intervals draw whole prompts, for the pairs of a prompt hang together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline_lib.evaluation.stats import Array, Bootstrap, interval, mean, ratio_of_sums, slope
from pipeline_lib.schema import Interval, Strength
from pipeline_lib.validation import Frozen

NUM_MARGIN_BUCKETS = 4
NUM_RELIABILITY_BINS = 10
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_STRENGTHS: tuple[Strength, ...] = ("significantly", "better", "slightly", "unsure")


class ScoredRow(Frozen):
    """A held-out comparison with the reward model's scores."""

    scores: tuple[float, ...] = Field(min_length=2)
    ranks: tuple[int, ...]
    """1 the best, equal numbers are ties."""
    lengths_words: tuple[float, ...]
    strength: Strength | None = None


class AccuracyBucket(Frozen):
    """Accuracy over some of the pairs."""

    name: str
    num_pairs: int
    accuracy_frac: Interval


class ReliabilityBin(Frozen):
    """Pairs whose predicted winner has a probability in [low, high)."""

    low_frac: float
    high_frac: float
    num_pairs: int
    confidence_frac: float | None
    """Mean probability of the predicted winner; None without pairs."""
    accuracy_frac: float | None
    """Share of pairs in which it is the better one; a predicted tie counts half."""


class ScoreDistribution(Frozen):
    """The raw scores of all held-out responses."""

    mean: float
    std: float
    """Biased: over N."""
    quantiles: dict[str, float]
    better_mean: float
    """Mean over the better response of every pair."""
    worse_mean: float


class ReportCard(Frozen):
    """Everything measured on held-out comparisons."""

    figures: dict[str, float | None]
    """Plain figures by name; None where one cannot be computed."""
    intervals: dict[str, Interval]
    """Of those figures that are means over pairs or responses."""
    by_margin: tuple[AccuracyBucket, ...]
    """By how far apart the two scores are: quarters of the pairs, the closest first."""
    by_strength: tuple[AccuracyBucket, ...]
    """By how much better people found the better one; empty where no row says so."""
    by_rank_gap: tuple[AccuracyBucket, ...]
    """By how many places lie between the two; empty where all rows are pairs."""
    reliability: tuple[ReliabilityBin, ...]
    scores: ScoreDistribution


@dataclass(frozen=True)
class _Pairs:
    """All (better, worse) pairs as columns, `(P,)`."""

    row: NDArray[np.int64]
    better: Array
    worse: Array
    words_more: Array
    """Words of the better response less those of the worse."""
    rank_gap: NDArray[np.int64]

    @property
    def margin(self) -> Array:
        return self.better - self.worse

    @property
    def is_right(self) -> Array:
        return (self.margin > 0).astype(np.float64)

    @property
    def is_right_or_half(self) -> Array:
        """1, 0, and 1/2 where the scores are equal: what a coin would make of it."""
        result: Array = (self.margin > 0) + 0.5 * (self.margin == 0)
        return result


def report_card(rows: Sequence[ScoredRow], bootstrap: Bootstrap) -> ReportCard:
    """Measure a reward model on held-out comparisons.

    - `test_accuracy_frac`: share of pairs whose better response scores strictly higher.
    - `test_auc_frac`: chance that the better response of one pair scores higher than the worse
      response of any pair, ties half. Unlike accuracy it asks whether scores of different prompts
      can be compared, which PPO does.
    - `test_brier`: mean of (1 - sigma(margin))^2; 0.25 is guessing.
    - `test_calibration_error_frac`: expected calibration error, the mean distance of confidence and
      accuracy over `NUM_RELIABILITY_BINS` bins of equal width in 0.5 ... 1.
    - `length_bias_per_word`: slope of the score on the response's words.
    - `test_accuracy_longer_worse_frac`: accuracy on the pairs whose worse response has more words.

    Args:
        rows: Comparisons with scores; at least one pair among them.
        bootstrap: How intervals are computed.

    Raises:
        ValueError: There is no pair, or a row has not one score, rank and length a response.

    Source: Touvron et al. 2023 section 3.2.2 (accuracy by strength); Brier 1950; Naeini et al. 2015
    (calibration error); Mann and Whitney 1947 (AUC).
    """
    pairs = _pairs_of(rows)
    num_rows = len(rows)
    all_scores = np.array([score for row in rows for score in row.scores])
    words = [length for row in rows for length in row.lengths_words]
    intervals = {
        "test_accuracy_frac": _share(pairs.is_right, pairs.row, num_rows, bootstrap),
        "test_auc_frac": _auc(pairs, num_rows, bootstrap),
        "test_brier": _share((1 - _sigma(pairs.margin)) ** 2, pairs.row, num_rows, bootstrap),
        "test_calibration_error_frac": _calibration_error(pairs, num_rows, bootstrap),
        "length_bias_per_word": _length_slope(rows, bootstrap),
        "test_accuracy_longer_worse_frac": _accuracy_where(pairs.words_more < 0, pairs, num_rows, bootstrap),
        "test_accuracy_longer_better_frac": _accuracy_where(pairs.words_more > 0, pairs, num_rows, bootstrap),
    }
    figures = {name: found.value for name, found in intervals.items()} | {
        "test_margin": float(pairs.margin.mean()),
        "test_pairs": float(pairs.row.size),
        "test_rows": float(num_rows),
        "test_longer_better_frac": float((pairs.words_more > 0).mean()),
        "length_bias_per_word": slope(words, all_scores.tolist()),
    }
    return ReportCard(
        figures=figures, intervals=intervals, by_margin=_by_margin(pairs, num_rows, bootstrap),
        by_strength=_by_strength(rows, pairs, bootstrap), by_rank_gap=_by_rank_gap(pairs, num_rows, bootstrap),
        reliability=_reliability(pairs), scores=_distribution(all_scores, pairs),
    )  # fmt: skip


def _pairs_of(rows: Sequence[ScoredRow]) -> _Pairs:
    found: list[tuple[int, float, float, float, int]] = []
    for place, row in enumerate(rows):
        if not len(row.scores) == len(row.ranks) == len(row.lengths_words):
            raise ValueError(f"row {place} has {len(row.scores)} scores for {len(row.ranks)} ranks")
        found += [
            (
                place, row.scores[i], row.scores[j],
                row.lengths_words[i] - row.lengths_words[j], row.ranks[j] - row.ranks[i],
            )
            for i in range(len(row.ranks))
            for j in range(len(row.ranks))
            if row.ranks[i] < row.ranks[j]
        ]  # fmt: skip
    if not found:
        raise ValueError("no row has a better and a worse response")
    row_P, better_P, worse_P, words_P, gap_P = zip(*found, strict=True)
    return _Pairs(
        np.array(row_P), np.array(better_P, dtype=np.float64), np.array(worse_P, dtype=np.float64),
        np.array(words_P, dtype=np.float64), np.array(gap_P),
    )  # fmt: skip


def _sigma(margin: Array) -> Array:
    """1 / (1 + exp(-margin)), without overflow."""
    result: Array = np.exp(-np.logaddexp(0.0, -margin))
    return result


def _share(value_P: Array, row_P: NDArray[np.int64], num_rows: int, bootstrap: Bootstrap) -> Interval:
    """Mean over pairs, drawn by row; rows without such a pair are left out of the draws."""
    sums = np.bincount(row_P, weights=value_P, minlength=num_rows)
    counts = np.bincount(row_P, minlength=num_rows).astype(np.float64)
    with_pairs = counts > 0
    if not with_pairs.any():
        return _unknown(bootstrap)
    found = interval([sums[with_pairs].tolist(), counts[with_pairs].tolist()], ratio_of_sums, bootstrap)
    return found.model_copy(update={"num_examples": int(value_P.size)})


def _accuracy_where(chosen_P: NDArray[np.bool_], pairs: _Pairs, num_rows: int, bootstrap: Bootstrap) -> Interval:
    return _share(pairs.is_right[chosen_P], pairs.row[chosen_P], num_rows, bootstrap)


def _auc(pairs: _Pairs, num_rows: int, bootstrap: Bootstrap) -> Interval:
    """Mann-Whitney's U of all better scores against all worse ones; a resample weighs pairs by their row."""
    order_P = np.argsort(pairs.worse, kind="stable")
    below_P, not_above_P = (np.searchsorted(pairs.worse[order_P], pairs.better, side=side) for side in _SIDES)

    def auc(drawn_N: Array) -> float:
        times_P = np.bincount(drawn_N.astype(np.int64), minlength=num_rows)[pairs.row]
        weight_up_to = np.concatenate([[0], np.cumsum(times_P[order_P])])
        won_P = 0.5 * (weight_up_to[below_P] + weight_up_to[not_above_P])
        return float((times_P * won_P).sum() / times_P.sum() ** 2)

    def statistic(columns: Array) -> Array:
        return np.array([auc(drawn_N) for drawn_N in columns[0]])

    return interval([list(range(num_rows))], statistic, bootstrap)


def _bin_of(pairs: _Pairs) -> tuple[NDArray[np.int64], Array]:
    """Return each pair's reliability bin, and the probability of its predicted winner."""
    confidence_P = _sigma(np.abs(pairs.margin))
    place_P = np.floor((confidence_P - 0.5) * 2 * NUM_RELIABILITY_BINS).astype(np.int64)
    return np.minimum(place_P, NUM_RELIABILITY_BINS - 1), confidence_P


def _calibration_error(pairs: _Pairs, num_rows: int, bootstrap: Bootstrap) -> Interval:
    bin_P, confidence_P = _bin_of(pairs)
    off_BN = np.zeros((NUM_RELIABILITY_BINS, num_rows))
    np.add.at(off_BN, (bin_P, pairs.row), confidence_P - pairs.is_right_or_half)
    counts_N = np.bincount(pairs.row, minlength=num_rows).astype(np.float64)

    def statistic(columns: Array) -> Array:
        result: Array = np.abs(columns[:-1].sum(-1)).sum(0) / columns[-1].sum(-1)
        return result

    return interval([*off_BN.tolist(), counts_N.tolist()], statistic, bootstrap)


def _length_slope(rows: Sequence[ScoredRow], bootstrap: Bootstrap) -> Interval:
    """Least-squares slope of score on words over all responses, rows drawn whole."""

    def sums(row: ScoredRow) -> list[float]:
        x, y = np.array(row.lengths_words), np.array(row.scores)
        return [float(x.size), float(x.sum()), float(y.sum()), float((x * x).sum()), float((x * y).sum())]

    def statistic(columns: Array) -> Array:
        num, x, y, xx, xy = columns.sum(-1)
        result: Array = (num * xy - x * y) / (num * xx - x * x)
        return result

    return interval(np.array([sums(row) for row in rows]).T.tolist(), statistic, bootstrap)


def _by_margin(pairs: _Pairs, num_rows: int, bootstrap: Bootstrap) -> tuple[AccuracyBucket, ...]:
    size_P = np.abs(pairs.margin)
    order_P = np.argsort(size_P, kind="stable")
    found = []
    for members in np.array_split(order_P, min(NUM_MARGIN_BUCKETS, order_P.size)):
        chosen_P = np.zeros(order_P.size, dtype=bool)
        chosen_P[members] = True
        name = f"{size_P[members[0]]:.2g} … {size_P[members[-1]]:.2g}"
        found.append(_bucket(name, chosen_P, pairs, num_rows, bootstrap))
    return tuple(found)


def _by_strength(rows: Sequence[ScoredRow], pairs: _Pairs, bootstrap: Bootstrap) -> tuple[AccuracyBucket, ...]:
    strength_P = np.array([rows[place].strength or "" for place in pairs.row])
    return tuple(
        _bucket(strength, strength_P == strength, pairs, len(rows), bootstrap)
        for strength in _STRENGTHS
        if (strength_P == strength).any()
    )


def _by_rank_gap(pairs: _Pairs, num_rows: int, bootstrap: Bootstrap) -> tuple[AccuracyBucket, ...]:
    gaps = sorted(set(pairs.rank_gap.tolist()))
    if gaps == [1]:
        return ()
    return tuple(_bucket(str(gap), pairs.rank_gap == gap, pairs, num_rows, bootstrap) for gap in gaps)


def _bucket(
    name: str, chosen_P: NDArray[np.bool_], pairs: _Pairs, num_rows: int, bootstrap: Bootstrap
) -> AccuracyBucket:
    accuracy = _accuracy_where(chosen_P, pairs, num_rows, bootstrap)
    return AccuracyBucket(name=name, num_pairs=int(chosen_P.sum()), accuracy_frac=accuracy)


def _reliability(pairs: _Pairs) -> tuple[ReliabilityBin, ...]:
    bin_P, confidence_P = _bin_of(pairs)
    width = 0.5 / NUM_RELIABILITY_BINS
    found = []
    for place in range(NUM_RELIABILITY_BINS):
        inside_P = bin_P == place
        has_pairs = bool(inside_P.any())
        found.append(
            ReliabilityBin(
                low_frac=round(0.5 + place * width, 12), high_frac=round(0.5 + (place + 1) * width, 12),
                num_pairs=int(inside_P.sum()),
                confidence_frac=float(mean(confidence_P[None, inside_P])) if has_pairs else None,
                accuracy_frac=float(mean(pairs.is_right_or_half[None, inside_P])) if has_pairs else None,
            )
        )  # fmt: skip
    return tuple(found)


def _distribution(all_scores: Array, pairs: _Pairs) -> ScoreDistribution:
    return ScoreDistribution(
        mean=float(all_scores.mean()), std=float(all_scores.std()),
        quantiles={f"{share:g}": float(np.quantile(all_scores, share)) for share in _QUANTILES},
        better_mean=float(pairs.better.mean()), worse_mean=float(pairs.worse.mean()),
    )  # fmt: skip


def _unknown(bootstrap: Bootstrap) -> Interval:
    return Interval(value=None, low=None, high=None, confidence_frac=bootstrap.confidence_frac, num_examples=0)
