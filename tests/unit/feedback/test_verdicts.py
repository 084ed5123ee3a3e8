"""Both orders make one verdict, verdicts make scores, and two judgements agree: by hand."""

from __future__ import annotations

import pytest

from pipeline_lib.feedback.agreement import agreement, cohens_kappa, leanings, preferred
from pipeline_lib.feedback.questions import Question
from pipeline_lib.feedback.verdicts import PairVerdict, judged


@pytest.mark.parametrize(
    ("in_order", "swapped", "outcome"),
    [(1, 1, 1), (0, 0, 0), (1, 0, 0.5), (0, 1, 0.5), (0.5, 1, 0.5), (0.5, 0.5, 0.5), (None, 1, None), (0, None, None)],
)
def test_a_win_counts_in_both_orders_alone(
    in_order: float | None, swapped: float | None, outcome: float | None
) -> None:
    assert PairVerdict(0, 1, in_order, swapped).outcome == outcome


def asked(order: tuple[int, ...], standing: dict[int, float] | None) -> tuple[Question, dict[int, float] | None]:
    return Question(order, ""), standing


def test_a_score_is_the_adjusted_win_rate() -> None:
    found = judged(
        "pair", 3,
        [
            asked((0, 1), {0: 1, 1: 0}), asked((1, 0), {1: 0, 0: 1}),  # 0 beats 1
            asked((0, 2), {0: 1, 2: 0}), asked((2, 0), {2: 1, 0: 0}),  # whoever is first: a tie
            asked((1, 2), {1: 0, 2: 1}), asked((2, 1), None),  # one cannot be read
        ],
    )  # fmt: skip
    assert [pair.outcome for pair in found.pairs] == [1, 0.5, None]
    assert found.scores == (0.75, 0.0, 0.5)
    nothing = judged("pair", 2, [asked((0, 1), None), asked((1, 0), {0: 1, 1: 0})])
    assert nothing.scores == (None, None)


def test_a_ranking_is_read_as_its_pairs() -> None:
    # In order 0 > 1 > 2; in the other 0 > 2 = 1.
    found = judged("rank", 3, [asked((0, 1, 2), {0: 0, 1: -1, 2: -2}), asked((2, 1, 0), {0: 0, 1: -1, 2: -1})])
    assert [(pair.first, pair.second, pair.outcome) for pair in found.pairs] == [(0, 1, 1), (0, 2, 1), (1, 2, 0.5)]
    assert found.scores == (1.0, 0.25, 0.25)


def test_a_rating_is_the_mean_of_both_orders() -> None:
    found = judged("rate", 2, [asked((0, 1), {0: 0.9, 1: 0.5}), asked((1, 0), {0: 0.3, 1: 0.4})])
    assert found.scores == pytest.approx((0.6, 0.45))
    assert found.pairs[0].outcome == 0.5, "the two orders disagree on which is better"
    assert judged("rate", 2, [asked((0, 1), {0: 0.9, 1: 0.5}), asked((1, 0), None)]).scores == (None, None)


def test_one_response_is_neither_better_nor_worse() -> None:
    assert judged("pair", 1, []).scores == judged("rank", 1, []).scores == (0.5,)
    assert judged("rate", 1, [asked((0,), {0: 0.25})]).scores == (0.25,)


def test_kappa_by_hand() -> None:
    # 20 pairs: both yes 8, both no 5, one yes and other no 4, the reverse 3.
    verdicts = [(1.0, 1.0)] * 8 + [(0.0, 0.0)] * 5 + [(1.0, 0.0)] * 4 + [(0.0, 1.0)] * 3
    # p_o = 13/20; p_e = (12 * 11 + 8 * 9) / 400 = 204/400; kappa = (0.65 - 0.51) / 0.49.
    assert cohens_kappa(verdicts) == pytest.approx(0.14 / 0.49)
    assert cohens_kappa([(1.0, 1.0)] * 3) is None, "chance alone agrees on everything"
    assert cohens_kappa([(1.0, 0.0), (0.0, 1.0)]) == -1
    assert cohens_kappa([]) is None


def test_agreement_counts_ties_and_leaves_them_out() -> None:
    found = agreement([(1.0, 1.0), (0.5, 0.5), (1.0, 0.5), (0.0, 1.0)])
    # p_e: first (0: 1, .5: 1, 1: 2), second (0: 0, .5: 2, 1: 2), so (1 * 2 + 2 * 2) / 16.
    assert found.figures() == {
        "pairs": 4, "agree_frac": 0.5, "kappa": pytest.approx((0.5 - 0.375) / 0.625), "decided_pairs": 2,
        "decided_agree_frac": 0.5,
    }  # fmt: skip
    assert agreement([]).figures() == {
        "pairs": 0, "agree_frac": None, "kappa": None, "decided_pairs": 0, "decided_agree_frac": None,
    }  # fmt: skip
    assert [preferred(2, 1), preferred(1, 1), preferred(0, 1)] == [1, 0.5, 0]


def test_what_a_judge_favours() -> None:
    pairs = [
        (PairVerdict(0, 1, 1, 0), 10, 5),  # the first shown, both times
        (PairVerdict(0, 2, 1, 1), 10, 20),  # the shorter, whatever the order
        (PairVerdict(1, 2, 0, 0), 5, 20),  # the longer, whatever the order
        (PairVerdict(1, 3, 0.5, 0), 5, 5),  # a tie, then the first shown
        (PairVerdict(2, 3, 1, None), 20, 5),  # cannot be read
    ]
    found = leanings(pairs)
    # Of 7 verdicts that are no tie: first shown 2 + 1 + 1 + 1.
    assert found.first_shown_frac == pytest.approx(5 / 7)
    assert found.longer_frac == 0.5
    assert found.between_orders.num_pairs == 4
    assert found.between_orders.agree_frac == 0.5
