"""The stage `ppo` on a real store: what goes in, what comes out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.errors import ConfigError, DataError, DivergedError
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Record
from pipeline_lib.stages.contract import StageContext, StageOutput
from pipeline_lib.stages.ppo import PpoConfig, heldout_input, policy_prompts, run
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.breaker import CircuitBreaker
from tests.stage_bench import Told, commit, context_in
from tests.toy import encoder, record, write_reward_model

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
        further = heldout_input(config, {"other": self.inputs["reward_model"]})
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


def test_a_training_that_never_gained_is_an_error(bench: Bench) -> None:
    limits = dict.fromkeys(config(breaker={}).breaker.model_dump())  # type: ignore[union-attr]
    chosen = config(iterations=4, breaker={**limits, "max_kl_nats": 1e-5, "min_kl_nats": -1e-5})
    with pytest.raises(DivergedError, match=r"iteration 2: KL .*; iteration 3: KL .* no iteration had a higher reward"):
        bench.run(bench.dataset(*PROMPTS), chosen)


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


def test_an_unknown_held_out_reward_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="heldout_reward_model = 'safe': the run has no such reward model"):
        heldout_input(config(heldout_reward_model="safe"), {})
    assert heldout_input(config(), {}) == {}
