"""Stage `sft` with a reward model that chooses its weights: from a name in the configuration to the saved model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from flows.align import _sft_and_reward
from pipeline_lib.config import stage_key
from pipeline_lib.data.record_files import row_line
from pipeline_lib.errors import ConfigError
from pipeline_lib.models.tiny import byte_tokenizer, write_tiny_model
from pipeline_lib.schema import ArtifactRef, Split
from pipeline_lib.stages import sft
from pipeline_lib.stages.iterate import RoundStart
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.stages.sft import SftConfig, selection_input
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.sharding_limits import why_not_sharded
from tests.stage_bench import Told, commit, context_in
from tests.toy import ANSWERS, record, write_reward_model

pytestmark = pytest.mark.servers

QUICK: dict[str, Any] = {
    "batch_size": 4, "epochs": 4, "precision": "fp32", "adapter": None, "seed": 3, "max_prompt_tokens": 200,
    "max_response_tokens": 32, "early_stopping": {"held_out_frac": 0.4, "every_steps": 1, "patience": 99},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0},
}  # fmt: skip


@pytest.fixture
def inputs(store: ArtifactStore, tmp_path: Path) -> dict[str, ArtifactRef]:
    """A base model, rows, and a reward model of an earlier run."""
    write_tiny_model(tmp_path / "base" / "model", seed=0)
    (tmp_path / "rows").mkdir()
    rows = [record(f"question {number}", text) for number, text in enumerate(ANSWERS)]
    (tmp_path / "rows" / f"{Split.SFT.value}.jsonl").write_bytes(b"".join(row_line(row) for row in rows))
    judge = write_reward_model(tmp_path / "base" / "model", tmp_path / "judge" / "model")
    byte_tokenizer().save_pretrained(judge)
    (tmp_path / "judge" / "normalization.json").write_text(json.dumps({"gain": 30.0, "bias": 0.5}))
    kinds = {"base_model": ("base", "model"), "dataset": ("rows", "dataset"), "reward_model": ("judge", "reward_model")}
    return {role: commit(store, tmp_path / folder, kind) for role, (folder, kind) in kinds.items()}


def config_of(**select_by: Any) -> SftConfig:
    return SftConfig.model_validate({**QUICK, "select_by": {"max_new_tokens": 6, "prompts": 8, **select_by}})


def config_key(config: SftConfig) -> str:
    return stage_key("sft", sft.VERSION, config, {})


def run(store: ArtifactStore, tmp_path: Path, config: SftConfig, inputs: dict[str, ArtifactRef]) -> tuple[Any, Told]:
    told = Told()
    context = context_in(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", store, told=told, key=config_key(config))
    return sft.run(config, inputs, context), told


def test_the_stage_keeps_the_weights_of_the_best_score(
    store: ArtifactStore, tmp_path: Path, inputs: dict[str, ArtifactRef]
) -> None:
    output, told = run(store, tmp_path, config_of(reward_model="any"), inputs)
    scores = told.series("sft/held_out_score")
    assert len(scores) == 8
    assert len(set(scores)) > 2
    assert output.metrics["best_held_out_score"] == max(scores)
    assert told.texts[-1] == f"kept step {scores.index(max(scores)) + 1}, held-out score {max(scores):.4f}"
    by_loss = config_of(reward_model="last_round")
    other, told = run(store, tmp_path, by_loss, {role: inputs[role] for role in ("base_model", "dataset")})
    assert any("weights are chosen by the held-out loss" in line for line in told.lines)
    assert told.texts[-1].startswith("kept step ")
    assert "best_held_out_score" not in other.metrics
    weights = [load_file(each.directory / "model" / "model.safetensors") for each in (output, other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_reward_model_is_named_by_its_id_or_its_place(
    store: ArtifactStore, tmp_path: Path, inputs: dict[str, ArtifactRef]
) -> None:
    judge = inputs["reward_model"]
    for name in (judge.id, judge.id[:12], str(judge), store.uri(judge)):
        assert selection_input(config_of(reward_model=name), store, None) == {"reward_model": judge}
    assert selection_input(SftConfig(), store, judge) == {}
    earlier = ArtifactRef(kind="reward_model", id="3" * 64)
    last = config_of(reward_model="last_round")
    assert selection_input(last, store, None) == {}
    assert selection_input(last, store, earlier) == {"reward_model": earlier}
    with pytest.raises(ConfigError, match="0 artifacts of the store have an id that begins with 'nothing'"):
        selection_input(config_of(reward_model="nothing"), store, None)
    with pytest.raises(ConfigError, match=r"is the artifact dataset/.*, not a reward model"):
        selection_input(config_of(reward_model=inputs["dataset"].id), store, None)


def test_which_reward_model_chose_is_in_the_key(inputs: dict[str, ArtifactRef]) -> None:
    config = config_of(reward_model="last_round")
    others = [{**inputs, "reward_model": ArtifactRef(kind="reward_model", id=digit * 64)} for digit in "12"]
    assert len({stage_key("sft", sft.VERSION, config, each) for each in (inputs, *others)}) == 3


def test_a_reward_model_of_another_template_is_refused(
    store: ArtifactStore, tmp_path: Path, inputs: dict[str, ArtifactRef]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template} "
    tokenizer.save_pretrained(tmp_path / "judge" / "model")
    other = commit(store, tmp_path / "judge", "reward_model")
    with pytest.raises(ConfigError, match="was trained with another tokenizer or chat template"):
        run(store, tmp_path, config_of(reward_model="any"), {**inputs, "reward_model": other})


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValidationError, match="select_by chooses among the measurements of early_stopping"):
        SftConfig.model_validate({"select_by": {"reward_model": "abc"}})
    with pytest.raises(ValidationError, match="residual_dropout"):
        SftConfig.model_validate({"residual_dropout": 1.0})
    assert why_not_sharded(config_of(reward_model="abc")) == "select_by samples from the model that is trained"
    assert why_not_sharded(SftConfig.model_validate({**QUICK, "residual_dropout": 0.2})) is None


@pytest.mark.parametrize("start", [RoundStart(), RoundStart(number=2, model=ArtifactRef(kind="model", id="4" * 64))])
def test_the_flow_hands_the_stage_its_reward_model(start: RoundStart, store: ArtifactStore) -> None:
    calls: dict[str, dict[str, str]] = {}

    def stage(name: str, config: Any, **given: ArtifactRef) -> ArtifactRef:
        calls[name] = {role: ref.id[0] for role, ref in given.items()}
        return ArtifactRef(kind=name, id="5" * 64)

    config = RunConfig.model_validate({"iterate": {"retrain": ["sft", "reward"]}})
    given = {
        role: ArtifactRef(kind=role, id=digit * 64)
        for role, digit in (("base_model", "1"), ("dataset", "2"), ("reward_model", "3"))
    }
    recorder: Any = type("Recorder", (), {"__call__": staticmethod(stage), "services": SimpleNamespace(store=store)})()
    _sft_and_reward(config, recorder, start, given)
    base = "1" if start.model is None else "4"
    assert calls["sft"] == {"base_model": base, "dataset": "2", "reward_model": "3"}
    assert calls["reward"] == {"sft_model": "5", "dataset": "2"}
