"""The report card against numbers worked out by hand and against brute force."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from pipeline_lib.evaluation.report_card import ReportCard, ScoredRow, report_card
from pipeline_lib.evaluation.stats import Bootstrap

QUICK = Bootstrap(resamples=200)


def row(better: float, worse: float, *, words: tuple[int, int] = (5, 5), strength: str | None = None) -> ScoredRow:
    return ScoredRow(scores=(better, worse), ranks=(1, 2), lengths_words=words, strength=strength)


def card(*rows: ScoredRow) -> ReportCard:
    return report_card(rows, QUICK)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BY_HAND = (row(2.0, 0.0), row(1.0, 0.0), row(0.0, 1.0), row(3.0, 3.0))


def test_figures_by_hand() -> None:
    """Margins 2, 1, -1, 0: two of four right. AUC: better {2, 1, 0, 3} against worse {0, 0, 1, 3}.

    2 beats 0, 0, 1 = 3; 1 beats 0, 0 and ties 1 = 2.5; 0 ties 0, 0 = 1; 3 beats three and ties one = 3.5.
    """
    figures = card(*BY_HAND).figures
    assert figures["test_accuracy_frac"] == 0.5
    assert figures["test_margin"] == 0.5
    assert figures["test_pairs"] == 4.0
    assert figures["test_rows"] == 4.0
    assert figures["test_auc_frac"] == pytest.approx((3 + 2.5 + 1 + 3.5) / 16)
    brier = [(1 - sigma(2)) ** 2, (1 - sigma(1)) ** 2, (1 - sigma(-1)) ** 2, 0.25]
    assert figures["test_brier"] == pytest.approx(sum(brier) / 4, abs=1e-12)


def test_reliability_by_hand() -> None:
    """Confidence: sigma(2) = 0.881 is bin 7, sigma(1) = 0.731 twice is bin 4, 0.5 is bin 0 and half right."""
    found = card(*BY_HAND)
    assert [place.num_pairs for place in found.reliability] == [1, 0, 0, 0, 2, 0, 0, 1, 0, 0]
    assert [place.accuracy_frac for place in found.reliability if place.num_pairs] == [0.5, 0.5, 1.0]
    assert found.reliability[4].confidence_frac == pytest.approx(sigma(1))
    assert (found.reliability[4].low_frac, found.reliability[4].high_frac) == (0.7, 0.75)
    expected = (abs(sigma(2) - 1) + abs(2 * sigma(1) - 1) + 0) / 4
    assert found.figures["test_calibration_error_frac"] == pytest.approx(expected, abs=1e-12)


def test_scores_by_hand() -> None:
    scores = card(*BY_HAND).scores
    given = [2, 0, 1, 0, 0, 1, 3, 3]
    assert scores.mean == 1.25
    assert scores.std == pytest.approx(math.sqrt(sum((x - 1.25) ** 2 for x in given) / 8))
    assert scores.quantiles["0.5"] == 1.0
    assert (scores.better_mean, scores.worse_mean) == (1.5, 1.0)


def test_a_sure_and_right_model() -> None:
    figures = card(row(900.0, -900.0), row(800.0, -800.0)).figures
    assert figures["test_accuracy_frac"] == 1.0
    assert figures["test_auc_frac"] == 1.0
    assert figures["test_brier"] == 0.0
    assert figures["test_calibration_error_frac"] == 0.0


def test_accuracy_needs_no_common_scale_and_auc_does() -> None:
    """Every pair is right, but the scores of the second prompt all lie above those of the first."""
    figures = card(row(1.0, 0.0), row(11.0, 10.0)).figures
    assert figures["test_accuracy_frac"] == 1.0
    assert figures["test_auc_frac"] == pytest.approx(3 / 4)


def test_length_bias_by_hand() -> None:
    """Scores are words / 10: the model likes nothing but length, so it is right where the longer is better."""
    found = card(
        row(2.0, 1.0, words=(20, 10)), row(1.0, 3.0, words=(10, 30)), row(0.5, 0.7, words=(5, 7)),
        row(0.4, 0.4, words=(4, 4)),
    )  # fmt: skip
    assert found.figures["length_bias_per_word"] == pytest.approx(0.1)
    assert found.intervals["length_bias_per_word"].low == pytest.approx(0.1)
    assert found.figures["test_accuracy_longer_worse_frac"] == 0.0
    assert found.figures["test_accuracy_longer_better_frac"] == 1.0
    assert found.figures["test_longer_better_frac"] == 0.25
    assert found.intervals["test_accuracy_longer_worse_frac"].num_examples == 2


def test_no_slope_where_all_responses_are_of_one_length() -> None:
    found = card(*BY_HAND)
    assert found.figures["length_bias_per_word"] == 0.0
    assert found.intervals["length_bias_per_word"].value is None
    assert found.figures["test_accuracy_longer_worse_frac"] is None


def test_buckets_by_strength_and_margin() -> None:
    rows = [
        row(5.0, 0.0, strength="significantly"), row(4.0, 0.0, strength="significantly"),
        row(0.0, 0.2, strength="unsure"), row(0.3, 0.0), row(0.0, 0.1, strength="slightly"), row(2.0, 0.0),
        row(0.0, 1.0), row(3.0, 0.0, strength="slightly"),
    ]  # fmt: skip
    found = card(*rows)
    strengths = [(bucket.name, bucket.num_pairs, bucket.accuracy_frac.value) for bucket in found.by_strength]
    assert strengths == [("significantly", 2, 1.0), ("slightly", 2, 0.5), ("unsure", 1, 0.0)]
    # Margins in order of size: 0.1-, 0.2- | 0.3+, 1- | 2+, 3+ | 4+, 5+
    assert [bucket.accuracy_frac.value for bucket in found.by_margin] == [0.0, 0.5, 1.0, 1.0]
    assert [bucket.num_pairs for bucket in found.by_margin] == [2, 2, 2, 2]
    assert found.by_margin[1].name == "0.3 … 1"
    assert found.by_rank_gap == ()


def test_all_pairs_of_a_ranking_count_and_ties_do_not() -> None:
    """Ranks 1, 2, 2, 3: five pairs, one with a gap of 2. Scores 3, 1, 0, 2 get 1 > 2, 1 > 2, 1 > 3 right."""
    found = card(ScoredRow(scores=(3.0, 1.0, 0.0, 2.0), ranks=(1, 2, 2, 3), lengths_words=(1, 2, 3, 4)))
    assert found.figures["test_pairs"] == 5.0
    assert found.figures["test_accuracy_frac"] == pytest.approx(3 / 5)
    gaps = [(bucket.name, bucket.num_pairs, bucket.accuracy_frac.value) for bucket in found.by_rank_gap]
    assert gaps == [("1", 4, 0.5), ("2", 1, 1.0)]


def test_against_brute_force() -> None:
    draw = random.Random(7)
    rows = []
    for _ in range(30):
        num = draw.randint(2, 4)
        scores = tuple(round(draw.gauss(0, 1.5), 1) for _ in range(num))
        ranks = (1, 2, *(draw.randint(1, 3) for _ in range(num - 2)))
        rows.append(ScoredRow(scores=scores, ranks=ranks, lengths_words=tuple(draw.randint(1, 9) for _ in scores)))
    pairs = [(r.scores[i], r.scores[j]) for r in rows for i, j in product(range(len(r.ranks)), repeat=2)
             if r.ranks[i] < r.ranks[j]]  # fmt: skip
    found = card(*rows)
    wins = sum((a > b) + 0.5 * (a == b) for (a, _), (_, b) in product(pairs, pairs))
    assert found.figures["test_auc_frac"] == pytest.approx(wins / len(pairs) ** 2)
    assert found.figures["test_accuracy_frac"] == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    bins: dict[int, list[float]] = {}
    for a, b in pairs:
        confidence = sigma(abs(a - b))
        bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append(confidence - ((a > b) + 0.5 * (a == b)))
    error = sum(abs(sum(off)) for off in bins.values()) / len(pairs)
    assert found.figures["test_calibration_error_frac"] == pytest.approx(error)
    assert sum(place.num_pairs for place in found.reliability) == len(pairs)


def test_intervals_hold_the_estimate_and_narrow_with_rows() -> None:
    draw = random.Random(1)
    few = [row(draw.gauss(0.6, 1), draw.gauss(0, 1), words=(draw.randint(1, 9), draw.randint(1, 9))) for _ in range(30)]
    many = few * 9
    for name, found in card(*few).intervals.items():
        assert found.value is not None
        assert found.low is not None
        assert found.high is not None
        # The calibration error is biased upwards in resamples, its interval may lie above the estimate.
        assert found.low <= found.value <= found.high or name == "test_calibration_error_frac"
        narrower = card(*many).intervals[name]
        assert narrower.value == pytest.approx(found.value)
        assert narrower.high is not None
        assert narrower.low is not None
        assert narrower.high - narrower.low < 0.6 * (found.high - found.low)


def test_prompts_are_drawn_whole() -> None:
    """Ten pairs of one prompt are no ten observations: one prompt alone has an interval of no width."""
    alone = card(ScoredRow(scores=(3.0, 1.0, 2.0), ranks=(1, 2, 3), lengths_words=(1, 1, 1)))
    found = alone.intervals["test_accuracy_frac"]
    assert (found.low, found.value, found.high) == pytest.approx((2 / 3, 2 / 3, 2 / 3))


def test_resamples_of_rows_with_unequal_pairs_are_divided_by_their_own_pairs() -> None:
    """Better responses always win, so AUC is 1 whichever of the rows, of one pair and of three, are drawn."""
    ranking = ScoredRow(scores=(9.0, 9.0, 9.0, 1.0), ranks=(1, 1, 1, 2), lengths_words=(1, 1, 1, 1))
    found = card(ranking, row(8.0, 2.0)).intervals["test_auc_frac"]
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_the_card_is_json_and_the_same_each_time() -> None:
    one, other = card(*BY_HAND), card(*BY_HAND)
    assert one == other
    assert ReportCard.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ScoredRow(scores=(1.0, 2.0), ranks=(1, 1), lengths_words=(1, 1))], "no row has a better"),
        ([ScoredRow(scores=(1.0, 2.0), ranks=(1, 2, 3), lengths_words=(1, 1))], "row 0 has 2 scores for 3 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(rows: list[ScoredRow], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_card(rows, QUICK)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_are_finite(score: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        row(score, 0.0)
