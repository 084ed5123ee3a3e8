"""How figures are written and drawn."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from pipeline_lib.evaluation.report.charts import Axis, interval_chart, line_chart, rule_chart
from pipeline_lib.evaluation.report.wording import bounds, count, duration, number, percent, size
from pipeline_lib.schema import Interval


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.4, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (-0.1234, "−0.123"), (0.00123, "0.0012"),
        (1.23e-5, "1.2e−5"), (0, "0"), (math.nan, "–"), (None, "–"), (math.inf, "–"), (True, "–"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value: object, text: str) -> None:
    assert number(value) == text


def test_other_figures_are_written_for_people() -> None:
    assert (count(12345.0), count(None)) == ("12,345", "–")
    assert (percent(0.5), percent(0.84375), percent(math.nan)) == ("50\u00a0%", "84.4\u00a0%", "–")
    assert [duration(value) for value in (8.24, 185, 4320, None)] == ["8.2 s", "3 min 05 s", "1 h 12 min", "–"]
    assert [size(value) for value in (300 * 1024**2, 2.5 * 1024**3, None)] == ["300 MiB", "2.5 GiB", "–"]
    assert bounds(Interval(value=None, low=None, high=None, confidence_frac=0.95, num_examples=0)) == "–"


def test_axes_map_values_to_pixels_and_have_round_ticks() -> None:
    axis = Axis(0.0, 10.0, 100.0, 200.0)
    assert (axis(0), axis(5), axis(10)) == (100.0, 150.0, 200.0)
    assert axis.ticks() == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert Axis.over([3.0], 0, 1).low < 3.0 < Axis.over([3.0], 0, 1).high


def test_charts_of_nothing_are_empty_and_long_curves_stay_small(synthetic: SimpleNamespace) -> None:
    unknown = Interval(value=None, low=None, high=None, confidence_frac=0.95, num_examples=0)
    assert line_chart([], title="t", x_label="step") == ""
    assert interval_chart([("base", unknown)], title="t", baseline=None) == ""
    assert rule_chart(synthetic.rule("r", "kl", "fail", None, None, None, threshold=1.0, against=None)) == ""
    long = line_chart([(float(step), math.sin(step / 50)) for step in range(10_000)], title="t", x_label="step")
    assert len(long) < 20_000
    assert "<b>" not in line_chart([(0.0, 1.0)], title="<b>", x_label="step")
