"""Candidates in rounds: what each round samples and trains, and which configurations are refused."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline_lib.errors import ConfigError
from pipeline_lib.stages.rounds_config import BestOfNConfig, IteratedDpoConfig, RaftConfig, SdfConfig
from pipeline_lib.stages.run_config import RunConfig, start_of
from pipeline_lib.validation import validate

JUDGE: dict[str, Any] = {"name": "judge", "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}


def run_config(**candidates: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, {"dpo": None, "ppo": None, "candidates": candidates}, where="test")


def test_each_round_has_its_temperature_and_its_prompts() -> None:
    config = RaftConfig(temperatures=(1.0, 1.2), rounds=4, seed=5, max_prompt_tokens=99)
    assert [config.rollouts(number).temperature for number in (1, 2, 3, 4)] == [1.0, 1.2, 1.2, 1.2]
    assert [config.rollouts(number).round for number in (1, 4)] == [1, 4]
    assert (config.rollouts(1).seed, config.rollouts(1).max_prompt_tokens) == (5, 99)


def test_the_settings_of_training_are_those_of_every_round() -> None:
    raft = RaftConfig.model_validate({"batch_size": 7, "epochs": 2, "optimizer": {"learning_rate": 1e-5}})
    sft = raft.sft()
    assert (sft.batch_size, sft.epochs, sft.optimizer.learning_rate) == (7, 2, 1e-5)
    assert sft.train_on == "last_assistant_turn"
    dpo = IteratedDpoConfig.model_validate({"batch_size": 7, "loss": {"name": "ipo"}})
    assert (dpo.preference().batch_size, dpo.preference().loss["name"]) == (7, "ipo")
    assert dpo.rollouts(2).compared == "best_and_worst"


def test_the_labels_of_a_round() -> None:
    assert RaftConfig().labelling("x") is None
    people = IteratedDpoConfig.model_validate({"labels": {"name": "people", "directory": "to/label"}}).labelling("x")
    assert people is not None
    assert (people.file, people.compared, people.labels.name) == ("to/label/x.jsonl", "best_and_worst", "people")
    judge = SdfConfig.model_validate(
        {"select": "top_share", "top_frac": 0.3, "labels": {**JUDGE, "form": "rate", "scale": "1-100"}}
    ).labelling("x")
    assert judge is not None
    assert (judge.file, judge.select, judge.top_frac) == ("", "top_share", 0.3)


def test_who_labels_changes_nothing_of_what_is_sampled() -> None:
    plain, judged = RaftConfig(), RaftConfig.model_validate({"labels": JUDGE})
    assert plain.rollouts(2) == judged.rollouts(2)
    assert plain.sft() == judged.sft()
    assert "labels" not in plain.rollouts(1).model_dump()


def test_the_methods_have_the_defaults_of_their_papers() -> None:
    sdf = SdfConfig()
    assert (sdf.rounds, sdf.sampling.samples_per_prompt, sdf.sampling.top_p) == (1, 4, 0.95)
    assert sdf.adapter is not None
    assert sdf.adapter.model_dump(include={"rank", "alpha", "dropout"}) == {"rank": 8, "alpha": 16, "dropout": 0.05}
    assert BestOfNConfig().sampling.samples_per_prompt == 16
    assert RaftConfig().rollouts(1).select == "best_of_prompt"
    assert (RaftConfig(select="top_share").rollouts(1).top_frac, RaftConfig().keep) == (0.2, "round")


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ({"method": "best_of_n", "rounds": 2}, "rounds"),
        ({"method": "sdf", "adapter": None}, "adapter is null"),
        ({"method": "iterated_dpo", "sampling": {"samples_per_prompt": 1}}, "two or more responses"),
        ({"method": "iterated_dpo", "loss": {"name": "dop"}}, "did you mean"),
        ({"method": "iterated_dpo", "keep": "all"}, "unknown key"),
        ({"method": "raft", "temperatures": []}, "temperatures"),
        ({"method": "raff"}, "did you mean 'raft'"),
        ({"method": "raft", "labels": {"name": "poeple"}}, "did you mean 'people'"),
        ({"method": "raft", "labels": {"name": "judge"}}, "give one of endpoint and recorded"),
        ({"method": "sdf", "select": "top_share", "labels": {"name": "people"}}, "order those of one prompt alone"),
        ({"method": "raft", "select": "top_share", "labels": JUDGE}, "order those of one prompt alone"),
        (
            {
                "method": "sdf",
                "labels": {
                    **JUDGE,
                    "endpoint": {"url": "http://far.example", "model": "m", "auth_variable": "PREFLINE_JUDGE_KEY"},
                },
            },
            "must be https",
        ),
        (
            {
                "method": "sdf",
                "labels": {
                    **JUDGE,
                    "endpoint": {"url": "https://far.example", "model": "m", "auth_variable": "AWS_SECRET_ACCESS_KEY"},
                },
            },
            "auth_variable",
        ),
        ({"method": "raft", "start_from": "stf"}, "no candidate 'stf'"),
        ({"method": "raft", "start_from": "one"}, "one -> one goes round in a circle"),
    ],
)
def test_what_does_not_fit_is_refused(candidate: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config(one=candidate)


def test_a_candidate_may_start_from_another_but_not_in_a_circle() -> None:
    config = run_config(raft={"method": "raft"}, after={"method": "ppo", "start_from": "raft"})
    assert {name: start_of(each) for name, each in config.all_candidates().items()} == {"raft": "sft", "after": "raft"}
    with pytest.raises(ConfigError, match="circle"):
        run_config(a={"method": "raft", "start_from": "b"}, b={"method": "ppo", "start_from": "a"})
