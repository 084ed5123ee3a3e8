"""What goes wrong around a policy's own samples: named with its rows; the rest goes on, or the stage stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.errors import DataError, DivergedError, RewardError
from pipeline_lib.schema import Record
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.breaker import CircuitBreaker
from pipeline_lib.training.settings import BreakerSettings
from tests.toy import record
from tests.unit.stages.policy_bench import PolicyBench, config, series_of, weights_in

pytestmark = pytest.mark.servers

METHODS = ["ppo", "grpo", "rloo"]
PROMPTS = [record(text) for text in ("good one", "good two", "good three", "bad")]
BAD = PROMPTS[3].id[:12]
MODULE = """
import math, os

def is_bad(row):
    return row["prompt"][-1]["content"] == "bad"

def length(row):
    return len(row["response"]) / 8

def fine(rows):
    return [length(row) for row in rows]

def raises(rows):
    for row in rows:
        if is_bad(row):
            raise ValueError("no such answer")
    return fine(rows)

def nan(rows):
    return [math.nan if is_bad(row) else length(row) for row in rows]

def drops(rows):
    return [length(row) for row in rows if not is_bad(row)]

def hangs(rows):
    for row in rows:
        while is_bad(row):
            pass
    return fine(rows)

def crashes(rows):
    for row in rows:
        if is_bad(row):
            os._exit(7)
    return fine(rows)

def fewer(rows):
    return [1.0]
"""
REASONS = {
    "raises": "ValueError: no such answer at stage_rewards.py:",
    "nan": "nan is not finite",
    "drops": "it returned 0 numbers for 1 responses",
    "hangs": "hung for 0.4 s at stage_rewards.py:",
    "crashes": "its process ended with code 7",
}


@pytest.fixture
def bench(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PolicyBench:
    (tmp_path / "stage_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PREFLINE_REWARD_FUNCTIONS", "stage_rewards")
    return PolicyBench(store, tmp_path)


def rewards(function: str, **how: Any) -> dict[str, Any]:
    part = {"name": "function", "function": f"stage_rewards:{function}", "timeout_s": 0.4, "label": "own"}
    return {"parts": [part, {"name": "reward_model", "weight": 0.1}], **how}


@pytest.mark.parametrize("method", METHODS)
def test_a_set_of_rewards_trains_every_method(method: str, bench: PolicyBench) -> None:
    series = series_of(bench.run(config(method, rewards=rewards("fine")), *PROMPTS))
    for row in series:
        assert row["reward/scored_frac"] == 1.0
        assert row["score"] == pytest.approx(row["reward/own_weighted"] + row["reward/reward_model_weighted"], abs=1e-5)
        assert row["reward/total"] == pytest.approx(row["score"], abs=1e-5)
    speeds = {f"{method}/{name}" for name in ("rollout_tokens_per_s", "update_tokens_per_s")}
    assert speeds <= {name for _, figures in bench.told.figures for name in figures}


@pytest.mark.parametrize("fault", REASONS)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_row_that_a_function_fails_on_is_named_and_left_out_or_stops_the_stage(
    method: str, fault: str, bench: PolicyBench
) -> None:
    num_bad = 1 if method == "ppo" else 2
    with pytest.raises(RewardError) as caught:
        bench.run(config(method, rewards=rewards(fault)), *PROMPTS)
    said = f"reward 'own' could not score {num_bad} of {4 * num_bad} responses: row {BAD}: {REASONS[fault]}"
    assert str(caught.value.cause).startswith(said)
    assert "on_error: skip" in caught.value.next_step

    output = bench.run(config(method, rewards=rewards(fault, on_error="skip"), minibatches=1), *PROMPTS)
    series = series_of(output)
    assert len(series) == 2, "one step an iteration, none lost"
    assert {row["reward/scored_frac"] for row in series} == {0.75}
    told = [line for line in bench.told.texts if line.startswith(f"row {BAD} is not scored: own: {REASONS[fault]}")]
    assert len(told) == 2 * num_bad, "once an iteration and sample"
    assert not [line for line in bench.told.texts if "is not scored" in line and line not in told]
    assert all("bad" not in row for row in (output.directory / "samples.jsonl").read_text().splitlines())


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_count_that_fits_no_row_stops_the_stage_even_where_rows_may_be_left_out(
    method: str, bench: PolicyBench
) -> None:
    count = 4 if method == "ppo" else 8
    with pytest.raises(RewardError, match=f"stage_rewards:fewer: it returned 1 numbers for {count} responses"):
        bench.run(config(method, rewards=rewards("fewer", on_error="skip")), *PROMPTS)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_scored_responses_stop_the_stage(method: str, bench: PolicyBench) -> None:
    chosen = config(method, rewards=rewards("nan", on_error="skip", min_scored_frac=0.25), batch_size=2)
    words = "1 responses have a score, too few for 2 minibatches"
    if method != "ppo":
        words = "1 of 2 prompts have a score for each of their 2 samples, 2 are needed"
    with pytest.raises(RewardError, match=words):
        bench.run(chosen, PROMPTS[0], PROMPTS[3])


def blank() -> Record:
    """A row whose prompt says nothing."""
    row = record("blank")
    return row.model_copy(update={"messages": (row.messages[0].model_copy(update={"content": " \n"}),)})


@pytest.mark.parametrize("method", METHODS)
def test_prompts_that_nothing_can_be_sampled_after_are_named(method: str, bench: PolicyBench) -> None:
    empty = blank()
    with pytest.raises(DataError, match=f"1 prompts of the policy split are empty; rows: {empty.id[:12]}"):
        bench.run(config(method), *PROMPTS, empty)
    # The tiny model knows 2,048 positions.
    long = record("long " * 500)
    with pytest.raises(
        DataError, match=f"1 prompts leave no room for 8 tokens .* 2048; rows: {long.id[:12]}"
    ) as caught:
        bench.run(config(method, max_prompt_tokens=4096), *PROMPTS, long)
    assert caught.value.next_step == "set max_prompt_tokens to 2040 at most, or lower max_new_tokens"
    cut = config(method, max_prompt_tokens=2040, iterations=1, batch_size=2, minibatches=1)
    assert len(series_of(bench.run(cut, PROMPTS[0], long))) == 1, "cut to that length, it is a prompt like any other"


# The held-out score goes up and down. PPO is paid for words that are never said, and wanders; of groups whose samples
# all score the same nothing could be learnt, so they are paid for what the held-out model likes, and overshoot.
LIKED = {"parts": [{"name": "reward_model", "weight": -1}]}
WANDERING: dict[str, dict[str, Any]] = {
    "ppo": {"seed": 4, "kl_target_nats": None, "rewards": {"parts": [{"name": "words", "words": ["a", "e"]}]}},
    "rloo": {"seed": 0, "rewards": LIKED},
    "grpo": {"seed": 1, "rewards": LIKED},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_second_breach_ends_with_the_weights_of_the_best_held_out_reward(
    method: str, bench: PolicyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, None, None, None, None, "too far", "too far again"])
    monkeypatch.setattr(CircuitBreaker, "breach", lambda *_: next(answers))
    chosen = config(method, iterations=6, breaker={}, heldout_reward_model="opposite", **WANDERING[method])
    output = bench.run(chosen, *PROMPTS)
    assert "iteration 6: too far; back to before iteration 5, at half the learning rate" in bench.told.texts
    series = series_of(output)
    assert len(series) == 10, "five iterations were trained on, the sixth never was"
    facts = json.loads((output.directory / "training.json").read_bytes())
    assert facts["breaches"] == ["iteration 6: too far", "iteration 6: too far again"]
    held_out = [row["heldout_score"] for row in series[::2]]
    best = held_out.index(max(held_out))
    assert facts["best_iteration"] == best
    assert 0 < best < 4, "neither the start nor what was measured last"
    # The same training, ended before the best iteration was trained on, has the weights that were kept.
    alone = bench.run(config(method, iterations=best, **WANDERING[method]), *PROMPTS)
    kept, expected = weights_in(output), weights_in(alone)
    assert kept.keys() == expected.keys()
    assert [name for name in kept if not torch.equal(kept[name], expected[name])] == []


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_never_gained_is_an_error(method: str, bench: PolicyBench) -> None:
    """Nothing but the reference itself is within the limits."""
    limits = {**dict.fromkeys(BreakerSettings.model_fields), "max_kl_nats": 1e-5, "min_kl_nats": -1e-5}
    with pytest.raises(
        DivergedError, match=r"iteration 2: KL .*; iteration 3: KL .* no iteration had a higher"
    ) as told:
        bench.run(config(method, iterations=4, breaker=limits), *PROMPTS)
    assert told.value.next_step.startswith("raise kl_coef" if method == "ppo" else "raise beta")


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_that_the_starting_model_is_past_is_refused_before_any_update(method: str, bench: PolicyBench) -> None:
    chosen = config(method, breaker={"min_entropy_nats": 50.0})
    with pytest.raises(DivergedError, match=r"iteration 1: entropy, nats a token: .* is below 50, before any update"):
        bench.run(chosen, *PROMPTS)
