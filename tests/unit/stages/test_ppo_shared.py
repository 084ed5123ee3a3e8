"""The stages `reward` and `ppo` one after the other: the policy's base is the critic's where it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Message, Origin, Record, Response
from pipeline_lib.stages import ppo, reward
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.reward import RewardConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.critic import Critic
from tests.stage_bench import Told, commit, context_in

pytestmark = pytest.mark.servers

SHARED = {
    "precision": "fp32", "batch_size": 4, "max_prompt_tokens": 64, "adapter": {"name": "lora", "rank": 4},
    "optimizer": {"learning_rate": 1e-2},
}  # fmt: skip
PPO = {"iterations": 2, "minibatches": 2, "ppo_epochs": 1, "max_new_tokens": 8}


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
        made = ppo._critic
        monkeypatch.setattr(ppo, "_critic", lambda *given: self.critics.append(made(*given)) or self.critics[-1])

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

    def ppo(self, reward_model: ArtifactRef, *, model: ArtifactRef | None = None, **changes: Any) -> list[Any]:
        """Train and return the series."""
        inputs = {"sft_model": model or self.model, "reward_model": reward_model, "dataset": self.dataset}
        output = ppo.run(PpoConfig.model_validate({**SHARED, **PPO, **changes}), inputs, self.context("ppo"))
        assert (output.directory / "model" / "model.safetensors").is_file()
        return [json.loads(line) for line in (output.directory / "metrics.jsonl").read_text().splitlines()]


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
    # The same reward model without its adapter, as one of before has none, is loaded whole.
    home = bench.store.fetch(reward_model, bench.tmp_path / "older")
    for path in (home / "adapter").iterdir():
        path.unlink()
    (home / "adapter").rmdir()
    apart = bench.ppo(commit(bench.store, home, "reward_model"))
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
