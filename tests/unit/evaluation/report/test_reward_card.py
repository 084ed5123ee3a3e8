"""The drawing of calibration: dots where confidence and accuracy say."""

from __future__ import annotations

import re

from pipeline_lib.evaluation.report.reward_card import card_view, reliability_chart
from pipeline_lib.evaluation.report_card import ReliabilityBin, ScoredRow, report_card
from pipeline_lib.evaluation.stats import Bootstrap


def place(confidence: float | None, accuracy: float | None, num_pairs: int) -> ReliabilityBin:
    return ReliabilityBin(
        low_frac=0.5, high_frac=0.55, num_pairs=num_pairs, confidence_frac=confidence, accuracy_frac=accuracy
    )


def test_dots_stand_where_confidence_and_accuracy_say() -> None:
    """400 x 250, the frame from x 46 to 386 and y 216 down to 14: a half and a half, sure and right."""
    drawn = reliability_chart([place(0.5, 0.5, 25), place(None, None, 0), place(1.0, 1.0, 100)])
    dots = re.findall(r'class="dot m-other" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', drawn)
    assert dots == [("46.0", "115.0", "5.5"), ("386.0", "14.0", "11.0")]
    assert "100\u00a0% sure, 100\u00a0% right, 100 pairs" in drawn
    assert '<line class="baseline" x1="46.0" y1="115.0" x2="386.0" y2="14.0"/>' in drawn


def test_nothing_is_drawn_without_pairs() -> None:
    assert reliability_chart([place(None, None, 0)]) == ""


def test_a_ranking_is_drawn_by_distance_and_pairs_are_not() -> None:
    ranking = ScoredRow(scores=(3.0, 1.0, 0.0), ranks=(1, 2, 3), lengths_words=(1, 2, 3))
    pair = ScoredRow(scores=(3.0, 1.0), ranks=(1, 2), lengths_words=(1, 2))
    titles = {
        kind: [drawing.title for drawing in card_view(report_card([row], Bootstrap(resamples=100))).drawings]
        for kind, row in {"ranking": ranking, "pair": pair}.items()
    }
    assert titles == {
        "ranking": ["Calibration", "Accuracy by margin", "Accuracy by distance in rank"],
        "pair": ["Calibration", "Accuracy by margin"],
    }
