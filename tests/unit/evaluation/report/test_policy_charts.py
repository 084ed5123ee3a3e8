"""Charts of trainings on own samples: what is where, and what is left out."""

from __future__ import annotations

import itertools
import re

import pytest

from pipeline_lib.evaluation.report.policy_charts import frontier_chart, lines_chart, path_chart
from pipeline_lib.evaluation.report.policy_runs import PolicyRun
from pipeline_lib.evaluation.report.policy_views import policy_view
from pipeline_lib.evaluation.report.series import Series, series_of
from pipeline_lib.schema import ArtifactRef, Interval


def interval(value: float | None, reach: float = 0.1) -> Interval:
    low, high = (None, None) if value is None else (value - reach, value + reach)
    return Interval(value=value, low=low, high=high, confidence_frac=0.95, num_examples=10)


def run_of(series: Series, **how: object) -> PolicyRun:
    values = {"samples": (), "breaches": (), "best_iteration": None, "names": ("ppo",), **how}
    return PolicyRun(stage="ppo", ref=ArtifactRef(kind="model", id="a" * 64), series=series, **values)  # type: ignore[arg-type]


def test_charts_of_nothing_are_empty() -> None:
    assert lines_chart([("a", [])], title="t", x_label="x") == ""
    assert path_chart([], title="t", x_label="x") == ""
    assert frontier_chart([("a", interval(None), interval(1.0))], title="t", x_label="x") == ""


def test_a_path_names_its_ends_and_stays_small() -> None:
    long = path_chart([(at, at * 0.1, at * 0.2) for at in range(1, 2001)], title="t", x_label="KL")
    assert re.findall(r'class="label"[^>]*>(\d+)<', long) == ["1", "2000"]
    assert long.count("<title>iteration") <= 61
    alone = path_chart([(1, 0.0, 0.5)], title="t", x_label="KL")
    assert re.findall(r'class="label"[^>]*>(\d+)<', alone) == ["1"]


def test_higher_reward_is_higher_and_more_kl_is_further_right() -> None:
    chart = path_chart([(1, 0.0, 0.0), (2, 4.0, 1.0)], title="t", x_label="KL")
    (first, second) = re.findall(r'<circle class="end" cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert float(second[0]) > float(first[0])
    assert float(second[1]) < float(first[1])


@pytest.mark.parametrize("apart", [0.0, 0.001])
def test_labels_of_near_models_do_not_overlap(apart: float) -> None:
    rows = [(name, interval(1.0 + place * apart), interval(2.0)) for place, name in enumerate(("dpo", "ppo", "grpo"))]
    chart = frontier_chart(rows, title="t", x_label="KL")
    heights = sorted(float(y) for y in re.findall(r'class="label" x="[\d.]+" y="([\d.]+)"', chart))
    assert len(heights) == 3
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12
    assert chart.count('class="whisker thin"') == 6, "an interval along each axis"


def test_a_line_that_is_another_one_once_more_is_not_drawn() -> None:
    rows = [
        {"iteration": at, "score": at, "shaped_score": at, "ref_kl_nats": at, "ref_kl_k2_nats": 2 * at}
        for at in (1, 2, 3)
    ]
    charts = {chart.title: chart for chart in policy_view(run_of(series_of(rows, "iteration"))).charts}
    assert list(charts) == ["Reward against KL", "Score", "KL from the reference"]
    assert charts["Score"].legend == ()
    assert charts["KL from the reference"].legend == ("k1", "k2")


def test_one_breach_is_told_as_a_return() -> None:
    view = policy_view(run_of({}, breaches=("iteration 3: too far",), best_iteration=2))
    assert view.outcome.startswith("The weights went back to the last iteration within the limits")
    assert policy_view(run_of({})).outcome == ""
    assert policy_view(run_of({}, names=("ppo", "champion", "kind"))).title == "PPO (kind)"
