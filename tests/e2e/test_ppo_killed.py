"""PPO and GRPO with all their state on, killed by `kill -9` in real child processes: the same artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import MemoryLimitError
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.execute import Job, execute
from pipeline_lib.stages.faults import KILL_VARIABLE
from pipeline_lib.stages.group import GrpoConfig
from pipeline_lib.stages.places import open_places
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.stages.rewards import pin_rewards
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit
from tests.toy import record, write_reward_model

pytestmark = [pytest.mark.servers, pytest.mark.slow]

SHARED: dict[str, Any] = {
    "iterations": 3, "batch_size": 4, "minibatches": 2, "max_new_tokens": 8, "precision": "fp32", "ema_decay": 0.9,
    "adapter": {"name": "lora", "rank": 4}, "max_prompt_tokens": 64, "tokens_per_batch": 64,
    "optimizer": {"learning_rate": 1e-2}, "breaker": {}, "heldout_reward_model": "other",
    "rewards": {
        "parts": [
            {"name": "reward_model", "normalize": "running", "clip": [-2, 2]},
            {"name": "length", "target": 4, "unit": "tokens", "normalize": "running"},
        ],
    },
}  # fmt: skip
PPO: dict[str, Any] = {
    **SHARED, "ppo_epochs": 1, "kl_target_nats": 0.5, "kl_horizon_responses": 20,
}  # fmt: skip
GRPO: dict[str, Any] = {**SHARED, "samples_per_prompt": 3, "missing_eos": "keep"}


class Place:
    """A store with what the stages take, and stages run from it in children."""

    def __init__(self, settings: S3Settings, home: Path, material: Path) -> None:
        self.settings, self.home = settings, home
        self.store = ArtifactStore(settings, cache_directory=home / "cache")
        self.inputs = {
            name: commit(self.store, material / name, kind)
            for name, kind in (("sft_model", "model"), ("reward_model", "reward_model"), ("dataset", "dataset"))
        }  # fmt: skip

    def run(self, config: PpoConfig | GrpoConfig) -> tuple[ArtifactRef, Told]:
        inputs = {**self.inputs, "heldout_reward_model": self.inputs["reward_model"]}
        job = Job(
            stage=config.method, config=config.model_dump(mode="json"), inputs=inputs, storage=self.settings,
            home=self.home, checkpoint_every_s=0, threads=1,
        )  # fmt: skip
        told = Told()
        return execute(job, store=self.store, events=told).ref, told


def steps_of(told: Told) -> list[int]:
    return [step for step, figures in told.figures if any(name.endswith("/loss") for name in figures)]


@pytest.fixture
def material(tmp_path: Path) -> Path:
    folder = tmp_path / "material"
    write_tiny_model(folder / "sft_model" / "model", seed=0)
    write_reward_model(folder / "sft_model" / "model", folder / "reward_model" / "model")
    (folder / "reward_model" / "normalization.json").write_text(json.dumps({"gain": 2.0, "bias": 0.5}))
    rows = [record(text) for text in ("a", "what?", "tell me", "why", "hello you")]
    (folder / "dataset").mkdir()
    (folder / "dataset" / "policy.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    (folder / "text.jsonl").write_text('{"text": "all of it"}\n{"text": "and more of it"}\n')
    return folder


@pytest.mark.timeout(240)
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_killed_children_leave_the_artifact_of_an_undisturbed_one(
    method: str, s3_server: S3Settings, tmp_path: Path, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, quiet = (
        Place(s3_server.model_copy(update={"prefix": f"{tmp_path.name}-{name}"}), tmp_path / name, material)
        for name in ("killed", "quiet")
    )
    chosen: PpoConfig | GrpoConfig = validate(GrpoConfig, GRPO, where="test")
    if method == "ppo":
        text = {"path": str(material / "text.jsonl"), "coef": 2.0, "rows_per_step": 1}
        chosen = validate(PpoConfig, {**PPO, "pretraining": text}, where="test")
    chosen = pin_pretraining(pin_rewards(chosen), open_places(quiet.store))
    expected, told = quiet.run(chosen)
    assert steps_of(told) == list(range(6))
    for point in ("step-0", "step-3", "before_commit"):
        monkeypatch.setenv(KILL_VARIABLE, f"{method}:{point}")
        with pytest.raises(MemoryLimitError, match="killed by signal 9"):
            killed.run(chosen)
    monkeypatch.delenv(KILL_VARIABLE)
    ref, told = killed.run(chosen)
    assert ref == expected, "weights, figures and samples, by their sha256"
    assert steps_of(told) == [5], "only the step after the last checkpoint is made again"
