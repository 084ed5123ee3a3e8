"""The stages that train on own samples, run on a real store with a tiny model and a tiny reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import Record
from pipeline_lib.stages import STAGES
from pipeline_lib.stages.contract import StageOutput
from pipeline_lib.stages.group import GrpoConfig, RlooConfig
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.reward_models import heldout_input
from pipeline_lib.stages.rewards import pin_rewards
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in
from tests.toy import write_reward_model

PolicyConfig = PpoConfig | RlooConfig | GrpoConfig
_SHARED: dict[str, Any] = {
    "iterations": 2, "batch_size": 4, "minibatches": 2, "max_new_tokens": 8, "precision": "fp32", "seed": 3,
    "adapter": {"name": "lora", "rank": 4}, "missing_eos": "keep", "max_prompt_tokens": 64,
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0},
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "ppo": {"ppo_epochs": 1}, "rloo": {"samples_per_prompt": 2}, "grpo": {"samples_per_prompt": 2},
}  # fmt: skip
_CLASSES: dict[str, type[PolicyConfig]] = {"ppo": PpoConfig, "rloo": RlooConfig, "grpo": GrpoConfig}


def config(method: str, **changes: Any) -> PolicyConfig:
    """A training of a second."""
    return validate(_CLASSES[method], {**_SHARED, **_OWN[method], **changes}, where=method)


class PolicyBench:
    """Artifacts that the stages take, and a stage run on them."""

    def __init__(self, store: ArtifactStore, tmp_path: Path) -> None:
        """Write a model, a reward model, and one that says the opposite."""
        self.store, self.tmp_path, self.told, self.num_runs = store, tmp_path, Told(), 0
        write_tiny_model(tmp_path / "sft" / "model", seed=0)
        for name, gain in (("reward", 2.0), ("opposite", -2.0)):
            write_reward_model(tmp_path / "sft" / "model", tmp_path / name / "model")
            (tmp_path / name / "normalization.json").write_text(json.dumps({"gain": gain, "bias": 0.5}))
        self.inputs = {
            "sft_model": commit(store, tmp_path / "sft", "model"),
            "reward_model": commit(store, tmp_path / "reward", "reward_model"),
        }
        self.opposite = commit(store, tmp_path / "opposite", "reward_model")

    def run(self, chosen: PolicyConfig, *rows: Record) -> StageOutput:
        """Run a method's stage on rows of the policy split."""
        self.num_runs += 1
        home = self.tmp_path / f"run-{self.num_runs}"
        (home / "dataset").mkdir(parents=True)
        (home / "dataset" / "policy.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
        self.told = Told()
        inputs = {**self.inputs, "dataset": commit(self.store, home / "dataset", "dataset")}
        inputs |= heldout_input(chosen, {"opposite": self.opposite}, main=inputs["reward_model"])
        context = context_in(home, self.store, told=self.told, key=f"{self.num_runs:064}")
        output = STAGES[chosen.method].run(pin_rewards(chosen), inputs, context)
        assert isinstance(output, StageOutput)
        return output


def series_of(output: StageOutput) -> list[dict[str, float]]:
    """The figures of every step."""
    return [json.loads(line) for line in (output.directory / "metrics.jsonl").read_text().splitlines()]


def weights_in(output: StageOutput) -> dict[str, Tensor]:
    """The weights that a stage saved."""
    return {
        f"{path.relative_to(output.directory)}:{name}": value
        for path in sorted((output.directory / "model").rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }
