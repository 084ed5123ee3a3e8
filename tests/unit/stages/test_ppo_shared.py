"""The stage `reward` and those that train on its score: one base for the policy and its reward models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Message, Origin, Record, Response
from pipeline_lib.stages import STAGES, ppo, reward
from pipeline_lib.stages.contract import StageContext, StageOutput
from pipeline_lib.stages.group import GrpoConfig, RlooConfig
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.reward import RewardConfig
from pipeline_lib.stages.reward_models import HELDOUT
from pipeline_lib.stages.rewards import pin_rewards
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.critic import Critic
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in
from tests.unit.stages.policy_bench import series_of

pytestmark = pytest.mark.servers

SHARED = {
    "precision": "fp32", "batch_size": 4, "max_prompt_tokens": 64, "adapter": {"name": "lora", "rank": 4},
    "optimizer": {"learning_rate": 1e-2},
}  # fmt: skip
ONLINE = {"iterations": 2, "minibatches": 2, "max_new_tokens": 8, "missing_eos": "keep"}
OWN: dict[str, dict[str, Any]] = {
    "ppo": {**ONLINE, "ppo_epochs": 1}, "rloo": {**ONLINE, "samples_per_prompt": 2},
    "grpo": {**ONLINE, "samples_per_prompt": 2},
}  # fmt: skip
CONFIGS: dict[str, type[PpoConfig | RlooConfig | GrpoConfig]] = {
    "ppo": PpoConfig, "rloo": RlooConfig, "grpo": GrpoConfig
}  # fmt: skip


def pair(n: int) -> Record:
    return Record.create(
        (Message(role="user", content=f"what {n}"),), (Response(content=f"yes {n}!"), Response(content=f"no {n}.")),
        (1, 2), origin=Origin(source="s"),
    )  # fmt: skip


class Bench:
    """Artifacts that both stages take, and the stages run on them."""

    def __init__(self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.tmp_path = store, tmp_path
        self.told = Told()
        self.critics: list[Critic] = []
        rows = [pair(n) for n in range(8)]
        (tmp_path / "rows").mkdir()
        for split in ("reward", "reward_test", "policy"):
            text = "".join(row.model_dump_json() + "\n" for row in rows)
            (tmp_path / "rows" / f"{split}.jsonl").write_text(text)
        self.dataset = commit(store, tmp_path / "rows", "dataset")
        self.model = self.sft_model(seed=0)
        made = ppo.open_critic
        monkeypatch.setattr(ppo, "open_critic", lambda *given: self.critics.append(made(*given)) or self.critics[-1])

    def sft_model(self, *, seed: int) -> ArtifactRef:
        write_tiny_model(self.tmp_path / f"model-{seed}" / "model", seed=seed)
        return commit(self.store, self.tmp_path / f"model-{seed}", "model")

    def context(self, name: str) -> StageContext:
        home = self.tmp_path / f"{name}-{len(list(self.tmp_path.iterdir()))}"
        return context_in(home, self.store, told=self.told, key=f"key-{home.name}")

    def reward_model(self, **changes: Any) -> ArtifactRef:
        config = RewardConfig.model_validate({**SHARED, "max_response_tokens": 48, "epochs": 4, **changes})
        output = reward.run(config, {"sft_model": self.model, "dataset": self.dataset}, self.context("reward"))
        return commit(self.store, output.directory, output.kind)

    def ppo(self, reward_model: ArtifactRef, **how: Any) -> list[Any]:
        """Train by PPO and return the series."""
        return self.train("ppo", reward_model, **how)

    def train(
        self,
        method: str,
        reward_model: ArtifactRef,
        *,
        model: ArtifactRef | None = None,
        further: Mapping[str, ArtifactRef] | None = None,
        **changes: Any,
    ) -> list[Any]:
        """Train by a method and return the series."""
        inputs = {"sft_model": model or self.model, "reward_model": reward_model, "dataset": self.dataset}
        config = validate(CONFIGS[method], {**SHARED, **OWN[method], **changes}, where=method)
        output = STAGES[method].run(pin_rewards(config), {**inputs, **(further or {})}, self.context(method))
        assert isinstance(output, StageOutput)
        assert (output.directory / "model" / "model.safetensors").is_file()
        return series_of(output)

    def whole(self, reward_model: ArtifactRef) -> ArtifactRef:
        """The same reward model without its adapter, as one of before has none."""
        home = self.store.fetch(reward_model, self.tmp_path / f"whole-{reward_model.id[:8]}")
        shutil.rmtree(home / "adapter")
        return commit(self.store, home, "reward_model")


@pytest.fixture
def bench(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(store, tmp_path, monkeypatch)


def test_one_base_where_the_reward_model_was_trained_on_it(bench: Bench) -> None:
    reward_model = bench.reward_model()
    paths = bench.store.manifest(reward_model).files
    assert {"adapter/adapter.json", "adapter/adapter.safetensors", "model/model.safetensors"} <= paths.keys()
    weights = bench.store.manifest(bench.model).files["model/model.safetensors"].sha256
    note = bench.store.read_json(reward_model, "adapter/adapter.json")
    assert note["base_sha256"]["model/model.safetensors"] == weights
    shared = bench.ppo(reward_model)
    assert bench.critics[0].is_on_policy
    assert not any("base of their own" in line for line in bench.told.lines)
    apart = bench.ppo(bench.whole(reward_model))
    assert not bench.critics[1].is_on_policy
    told = [line for line in bench.told.lines if "base of their own" in line]
    assert told == [
        "the reward model has no adapter of its own: value function and reward model get a base of their own"
    ]
    for one, other in zip(shared, apart, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["value_loss"] == pytest.approx(other["value_loss"], abs=1e-4)


def test_other_bases_and_other_adapters_get_a_base_of_their_own(bench: Bench) -> None:
    reward_model = bench.reward_model()
    bench.ppo(reward_model, model=bench.sft_model(seed=1))
    assert any("trained on other weights than those that the policy starts from" in line for line in bench.told.lines)
    bench.ppo(reward_model, adapter={"name": "lora", "rank": 4, "use_dora": True})
    assert any("the policy has no plain LoRA adapter" in line for line in bench.told.lines)
    full = bench.reward_model(adapter=None, optimizer={"learning_rate": 1e-3})
    assert not any(name.startswith("adapter/") for name in bench.store.manifest(full).files)
    bench.ppo(full)
    assert any("the reward model has no adapter of its own" in line for line in bench.told.lines)
    assert not any(critic.is_on_policy for critic in bench.critics)


@pytest.mark.parametrize("method", CONFIGS)
def test_every_reward_model_that_was_trained_on_the_policys_base_stands_on_it(method: str, bench: Bench) -> None:
    """The one that is trained against, a further one among the rewards, and the held-out one: scores as if apart."""
    models = [bench.reward_model(seed=seed) for seed in range(3)]
    rewards = {"parts": [{"name": "reward_model"}, {"name": "reward_model", "model": "safe", "label": "safe"}]}
    found = []
    for main, safe, heldout in (models, [bench.whole(model) for model in models]):
        found.append(
            bench.train(
                method, main, further={"reward_model:safe": safe, HELDOUT: heldout}, rewards=rewards,
                heldout_reward_model="other",
            )
        )  # fmt: skip
        told = [line for line in bench.told.lines if "a base of" in line]
        bench.told.lines.clear()
        if len(found) == 1:
            assert told == []
    first = "the reward model has no adapter of its own: "
    theirs = "value function and reward model get" if method == "ppo" else "reward_model gets"
    own = {"reward_model:safe gets", "heldout_reward_model gets"}
    if method == "ppo":
        assert f"{first}{theirs} a base of their own" in told
    else:
        own |= {theirs}
    assert {line.removeprefix(first).removesuffix(" a base of its own") for line in told if "its own:" in line} >= own
    shared, apart = found
    names = ("score", "heldout_score", "reward/reward_model", "reward/safe")
    for one, other in zip(shared, apart, strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-4)
    assert len({round(shared[0][name], 4) for name in names[1:]}) == 3, "three different models"


def test_a_reward_model_is_loaded_whole_where_only_it_was_trained_on_other_weights(bench: Bench) -> None:
    heldout = bench.reward_model(seed=1)
    bench.model = bench.sft_model(seed=1)
    series = bench.train("rloo", bench.reward_model(), further={HELDOUT: heldout}, heldout_reward_model="other")
    assert "heldout_score" in series[0]
    assert [line for line in bench.told.lines if "a base of" in line] == [
        "the reward model was trained on other weights than those that the policy starts from: "
        "heldout_reward_model gets a base of its own"
    ]
