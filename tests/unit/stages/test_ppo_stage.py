"""The stage `ppo` on a real store: what goes in, what comes out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Record
from pipeline_lib.stages.contract import StageContext, StageOutput
from pipeline_lib.stages.ppo import PpoConfig, policy_prompts, run
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.stages.reward_models import HELDOUT, heldout_input
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.breaker import CircuitBreaker
from tests.stage_bench import Told, commit, context_in
from tests.toy import encoder, record, write_reward_model
from tests.unit.stages.policy_bench import config as policy_config

pytestmark = pytest.mark.servers

PROMPTS = [
    record(text) for text in ("It was. He went.", "So. And then?", "x. One more. No", "no mark", "It was. He went.")
]


class Bench:
    """Artifacts that the stage takes, and the stage run on them."""

    def __init__(self, store: ArtifactStore, tmp_path: Path) -> None:
        self.store, self.tmp_path, self.told = store, tmp_path, Told()
        write_tiny_model(tmp_path / "sft" / "model", seed=0)
        write_reward_model(tmp_path / "sft" / "model", tmp_path / "reward" / "model")
        (tmp_path / "reward" / "normalization.json").write_text(json.dumps({"gain": 2.0, "bias": 0.5}))
        self.inputs = {
            "sft_model": commit(store, tmp_path / "sft", "model"),
            "reward_model": commit(store, tmp_path / "reward", "reward_model"),
        }

    def dataset(self, *rows: Record) -> ArtifactRef:
        directory = self.tmp_path / "dataset"
        directory.mkdir()
        (directory / "policy.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
        return commit(self.store, directory, "dataset")

    def context(self) -> StageContext:
        return context_in(self.tmp_path / "run", self.store, told=self.told)

    def run(self, dataset: ArtifactRef, config: PpoConfig) -> StageOutput:
        further = {} if config.heldout_reward_model is None else {HELDOUT: self.inputs["reward_model"]}
        return run(config, {**self.inputs, "dataset": dataset, **further}, self.context())


@pytest.fixture
def bench(store: ArtifactStore, tmp_path: Path) -> Bench:
    return Bench(store, tmp_path)


def config(**changes: Any) -> PpoConfig:
    return PpoConfig.model_validate({
        "iterations": 2, "batch_size": 4, "minibatches": 2, "ppo_epochs": 1, "max_new_tokens": 8, "precision": "fp32",
        "adapter": {"name": "lora", "rank": 4}, "optimizer": {"learning_rate": 1e-2}, **changes,
    })  # fmt: skip


def test_a_training_with_everything_on(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "all of it"}\n{"text": "and more of it"}\n')
    chosen = config(
        prompt_start_text=".", prompt_end_text=None, breaker={}, heldout_reward_model="other", value_init="zero",
        pretraining={"path": str(tmp_path / "text.jsonl"), "coef": 27.8, "rows_per_step": 2}, ema_decay=0.9,
    )  # fmt: skip
    output = bench.run(bench.dataset(*PROMPTS), pin_pretraining(chosen, LocalPlaces()))
    assert output.kind == "model"
    series = [json.loads(line) for line in (output.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in series] == [0, 1, 2, 3]
    assert {"heldout_score", "pretraining_nll_per_token_nats", "ref_kl_full_nats", "breaches"} <= series[0].keys()
    assert series[0]["heldout_score"] == pytest.approx(series[0]["score"], abs=1e-4)
    assert {"ppo/rollout_tokens_per_s", "ppo/loss"} <= bench.told.of_step(0).keys()
    assert "ppo/update_tokens_per_s" in bench.told.of_step(1)
    assert "1 of 5 prompts have no whole sentence and are left out" in bench.told.texts
    facts = json.loads((output.directory / "training.json").read_bytes())
    assert facts["rows"] == 3, "four prompts have a mark, two of them are the same"
    samples = [json.loads(line) for line in (output.directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert not any("It was" in row["prompt"] for row in samples)


def test_breaches_are_in_the_facts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, None, "too far", None, "too far again"])
    keep = CircuitBreaker.keep
    monkeypatch.setattr(CircuitBreaker, "breach", lambda *_: next(answers))
    monkeypatch.setattr(
        CircuitBreaker, "keep", lambda self, at, figures: keep(self, at, {**figures, "rlhf_reward": float(at)})
    )
    output = bench.run(bench.dataset(*PROMPTS), config(iterations=4, breaker={}))
    facts = json.loads((output.directory / "training.json").read_bytes())
    assert facts["breaches"] == ["iteration 3: too far", "iteration 4: too far again"]
    assert facts["best_iteration"] == 2


def test_empty_prompts_are_named(bench: Bench) -> None:
    blank = record("blank")
    blank = blank.model_copy(update={"messages": (blank.messages[0].model_copy(update={"content": " \n"}),)})
    with pytest.raises(DataError, match=f"1 prompts of the policy split are empty; rows: {blank.id[:12]}"):
        policy_prompts(config(), [*PROMPTS, blank], bench.context(), encoder=encoder())


def test_long_prompts_keep_the_sentences_that_fit(bench: Bench) -> None:
    """The template takes 19 tokens of bytes, so 27 leave eight: OpenAI cuts to the length before it cuts to a mark."""
    chosen = config(prompt_start_text=".", prompt_end_text=".", max_prompt_tokens=27)
    rows = [record("Begin. One two. Three. Four"), record("Begin. All of this is too long.")]
    kept = policy_prompts(chosen, rows, bench.context(), encoder=encoder(max_prompt_tokens=27))
    assert [row.messages[-1].content for row in kept] == ["One two."]
    assert "1 of 2 prompts have no whole sentence and are left out" in bench.told.texts


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_what_cannot_be_held_out_is_refused(method: str) -> None:
    main, other = (ArtifactRef(kind="reward_model", id=digit * 64) for digit in "12")
    chosen = policy_config(method, heldout_reward_model="safe")
    with pytest.raises(ConfigError, match="heldout_reward_model = 'safe': the run has no such reward model"):
        heldout_input(chosen, {}, main=main)
    with pytest.raises(ConfigError, match="it is the very model that the policy is trained against"):
        heldout_input(chosen, {"safe": main}, main=main)
    assert heldout_input(chosen, {"safe": other}, main=main) == {HELDOUT: other}
    assert heldout_input(policy_config(method), {"safe": other}, main=main) == {}
    trained_against = {"parts": [{"name": "reward_model"}, {"name": "reward_model", "model": "safe", "label": "safe"}]}
    with pytest.raises(ConfigError, match="'safe' is among the rewards too: what is trained against is not held out"):
        policy_config(method, heldout_reward_model="safe", rewards=trained_against)
