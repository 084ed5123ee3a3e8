"""A weighted set: the sum, what it is made of, what it remembers, and what it does about failures."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.errors import ConfigError, RewardError
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.reward_set import RewardScorer, RewardSet
from pipeline_lib.training.rewards.contract import Resources
from pipeline_lib.training.running_moments import RunningMoments
from pipeline_lib.validation import validate
from tests.unit.training.reward_samples import Heard, sample, samples


def reward_set(*parts: dict[str, Any], **how: Any) -> RewardSet:
    return validate(RewardSet, {"parts": parts, **how}, where="rewards")


def by_length(name: str, trees: Sequence[Tree], *, is_raw: bool) -> list[float]:
    """A reward model: the response's tokens, ten times of them where raw."""
    return [len(tree.response_ids[0]) * (10.0 if is_raw else 1.0) for tree in trees]


def test_the_score_is_the_weighted_sum_of_clipped_numbers() -> None:
    chosen = reward_set(
        {"name": "reward_model", "weight": 2.0, "clip": [2, 4]},
        {"name": "ends_with", "weight": -0.5},
        {"name": "length", "target": 1, "unit": "words", "label": "short"},
    )
    rewards = RewardScorer(chosen, Resources(scores_of=by_length)).score(samples("a", "ab.", "a b c."))
    # Tokens, with one more for the end: 2, 4, 7 -> clipped 2, 4, 4; full stops: 0, 1, 1; one word: 1, 1, 0.
    assert rewards.scores == (2 * 2 - 0 + 1, 2 * 4 - 0.5 + 1, 2 * 4 - 0.5 + 0)
    assert rewards.parts == {"reward_model": (2.0, 4.0, 7.0), "ends_with": (0, 1, 1), "short": (1, 1, 0)}
    expected = {
        "reward/reward_model": 13 / 3, "reward/reward_model_weighted": 20 / 3,
        "reward/reward_model_clipped_frac": 1 / 3,
        "reward/reward_model_std": math.sqrt(38) / 3,  # (49 + 1 + 64) / 9 / 3 = 38 / 9
        "reward/ends_with": 2 / 3, "reward/ends_with_weighted": -1 / 3, "reward/ends_with_std": math.sqrt(2) / 3,
        "reward/short": 2 / 3, "reward/short_weighted": 2 / 3, "reward/short_std": math.sqrt(2) / 3,
        "reward/total": 7.0, "reward/total_std": math.sqrt((4 + 2.25 + 0.25) / 3), "reward/scored_frac": 1.0,
    }  # fmt: skip
    assert rewards.figures == pytest.approx(expected)


def test_without_parts_it_is_the_reward_model() -> None:
    rewards = RewardScorer(RewardSet(), Resources(scores_of=by_length)).score(samples("ab", ""))
    assert rewards.scores == (3.0, 1.0)
    raw = reward_set({"name": "reward_model", "normalized": False})
    assert RewardScorer(raw, Resources(scores_of=by_length)).score(samples("ab")).scores == (30.0,)


def test_running_normalisation_counts_every_number_so_far() -> None:
    scorer = RewardScorer(
        reward_set({"name": "reward_model", "normalize": "running", "clip": [-1, 1]}), Resources(scores_of=by_length)
    )
    # 1 and 3: mean 2, deviation 1. Then 1, 3, 5, 7: mean 4, deviation sqrt(5).
    assert scorer.score(samples("", "ab")).scores == pytest.approx((-1, 1), abs=1e-7)
    second = scorer.score(samples("abcd", "abcdef"))
    assert second.scores == pytest.approx((1 / math.sqrt(5), 1.0), abs=1e-7)
    assert second.figures["reward/reward_model"] == 6.0  # the source's own number
    assert second.figures["reward/reward_model_clipped_frac"] == 0.5


def test_what_it_remembers_survives_a_checkpoint_bit_for_bit() -> None:
    chosen = reward_set({"name": "reward_model", "normalize": "running"}, {"name": "ends_with"})
    one = RewardScorer(chosen, Resources(scores_of=by_length))
    one.score(samples("a", "abc", "ab"))
    other = RewardScorer(chosen, Resources(scores_of=by_length))
    other.load_state(json.loads(json.dumps(one.state())))
    rows = samples("abcdefg", "b")
    assert other.score(rows) == one.score(rows)
    assert other.state() == one.state()


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_values_at_once(chunks: list[list[float]]) -> None:
    moments = RunningMoments()
    for chunk in chunks:
        moments = moments.with_values(chunk)
    values = [value for chunk in chunks for value in chunk]
    assert moments.count == len(values)
    if values:
        assert moments.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
        assert moments.variance == pytest.approx(statistics.pvariance(values), rel=1e-6, abs=1e-3)


def test_running_moments_far_from_zero_lose_nothing() -> None:
    # The textbook E[x^2] - E[x]^2 gives garbage here.
    drawn = random.Random(0)
    values = [1e9 + drawn.random() for _ in range(100)]
    moments = RunningMoments().with_values(values[:37]).with_values(values[37:])
    assert moments.variance == pytest.approx(statistics.pvariance(values), rel=1e-6)


def answers(*known: str) -> list[Any]:
    return [sample("6", name=f"row{place}", reference=answer) for place, answer in enumerate(known)]


def test_a_response_that_cannot_be_scored_stops_the_stage_with_its_row() -> None:
    scorer = RewardScorer(reward_set({"name": "reward_model", "normalize": "running"}, {"name": "exact_answer"}),
                          Resources(scores_of=by_length))  # fmt: skip
    before = scorer.state()
    with pytest.raises(RewardError) as caught:
        scorer.score(answers("6", "", "5", ""))
    assert caught.value.cause == (
        "reward 'exact_answer' could not score 2 of 4 responses: "
        "row row1: its row has no answer to compare with (number); "
        "row row3: its row has no answer to compare with (number)"
    )
    assert "on_error: skip" in caught.value.next_step
    assert scorer.state() == before


def test_or_is_left_out_and_told_of() -> None:
    heard = Heard()
    chosen = reward_set({"name": "exact_answer"}, {"name": "reward_model", "normalize": "running"}, on_error="skip")
    scorer = RewardScorer(chosen, heard.resources(scores_of=by_length))
    rewards = scorer.score(answers("6", "", "5", "7"))
    assert rewards.scores == (1.0, None, 0.0, 0.0)
    assert rewards.figures["reward/scored_frac"] == 0.75
    assert rewards.figures["reward/exact_answer"] == 1 / 3
    assert math.isnan(rewards.parts["exact_answer"][1])
    assert scorer.moments["reward_model"].count == 3
    assert heard.problems == [("row1", "exact_answer: its row has no answer to compare with (number)")]


def test_too_few_left_stops_the_stage_all_the_same() -> None:
    chosen = reward_set({"name": "exact_answer"}, on_error="skip", min_scored_frac=0.5)
    assert RewardScorer(chosen).score(answers("6", "")).scores == (1.0, None)
    with pytest.raises(RewardError, match="2 of 3 responses"):
        RewardScorer(chosen).score(answers("6", "", ""))


def test_many_rows_are_named_in_part() -> None:
    with pytest.raises(RewardError, match=r"row row4: [^;]+; and 2 more") as caught:
        RewardScorer(reward_set({"name": "exact_answer"})).score(answers(*[""] * 7))
    assert "row5" not in caught.value.cause


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_none(odd: float) -> None:
    resources = Resources(scores_of=lambda name, trees, *, is_raw: [1.0, odd])
    with pytest.raises(RewardError, match=r"could not score 1 of 2 responses: row row1: .* is not finite"):
        RewardScorer(RewardSet(), resources).score(samples("a", "b"))


def test_a_wrong_count_is_no_matter_of_rows() -> None:
    resources = Resources(scores_of=lambda name, trees, *, is_raw: [1.0])
    with pytest.raises(RewardError, match="'reward_model' gave 1 numbers for 2 responses"):
        RewardScorer(reward_set({"name": "reward_model"}, on_error="skip"), resources).score(samples("a", "b"))


def test_a_sources_own_figures_carry_its_label() -> None:
    chosen = reward_set({"name": "llama2", "label": "both"})
    figures = RewardScorer(chosen, Resources(scores_of=by_length)).score(samples("a", "ab")).figures
    assert figures["reward/both_safe_logit"] == 25.0
    assert figures["reward/both_by_safety_frac"] == 0.0


def test_the_configuration_is_written_out_and_knows_its_models() -> None:
    chosen = reward_set(
        {"name": "llama2", "safe": "harmless"}, {"name": "reward_model", "model": "other", "label": "second"}
    )
    assert chosen.reward_models == ("harmless", "other", "reward")
    assert chosen.parts[1] == {
        "name": "reward_model", "model": "other", "normalized": True, "label": "second", "weight": 1.0, "clip": None,
        "normalize": "none",
    }  # fmt: skip
    assert RewardSet.model_validate(chosen.model_dump(mode="json")) == chosen


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([], "parts"),
        ([{"name": "lenght"}], "did you mean 'length'"),
        ([{"name": "length", "target": 3, "wieght": 1}], "wieght"),
        ([{"name": "length", "target": 3, "weight": "much"}], "weight"),
        ([{"name": "length", "target": 3, "clip": [1, 1]}], "the first number must be below"),
        ([{"name": "length", "target": 3}, {"name": "length", "target": 4}], "'length' is there twice"),
        ([{"weight": 1}], "needs a name"),
        ([{"name": "length", "target": 3, "weight": math.nan}], "weight"),
    ],
)
def test_what_cannot_be_used_is_named(parts: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        reward_set(*parts)
