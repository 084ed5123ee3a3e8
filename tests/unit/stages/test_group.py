"""Stages `rloo` and `grpo` from rows to a saved model, on a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.config import PRESETS, load
from pipeline_lib.data.record_files import row_line
from pipeline_lib.errors import DataError
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.schema import ArtifactRef, Split
from pipeline_lib.stages import STAGES, group
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in
from tests.toy import record, write_reward_model

QUICK: dict[str, Any] = {
    "iterations": 2, "batch_size": 3, "samples_per_prompt": 2, "minibatches": 1, "mu": 2, "max_new_tokens": 6,
    "precision": "fp32", "missing_eos": "keep", "seed": 3, "max_prompt_tokens": 64,
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0},
}  # fmt: skip
CONFIGS = {"rloo": group.RlooConfig, "grpo": group.GrpoConfig}
ROWS = [record(f"question {n}?", "yes", "no") for n in range(4)]


@pytest.fixture
def context(store: ArtifactStore, tmp_path: Path) -> StageContext:
    return context_in(tmp_path / "run", store)


@pytest.fixture
def inputs(store: ArtifactStore, tmp_path: Path) -> dict[str, ArtifactRef]:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    write_tiny_model(tmp_path / "a" / "model", seed=0)
    write_reward_model(tmp_path / "a" / "model", tmp_path / "b" / "model")
    (tmp_path / "b" / "normalization.json").write_text('{"gain": 2.0, "bias": 0.5}')
    (tmp_path / "c" / f"{Split.POLICY.value}.jsonl").write_bytes(b"".join(row_line(row) for row in ROWS))
    return {
        "sft_model": commit(store, tmp_path / "a", "model"),
        "reward_model": commit(store, tmp_path / "b", "reward_model"),
        "dataset": commit(store, tmp_path / "c", "dataset"),
    }


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_is_trained_and_saved_with_its_figures(
    method: str, context: StageContext, inputs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    config = validate(CONFIGS[method], QUICK, where="test")
    output = group.run(config, inputs, context)
    assert output.kind == "model"
    assert output.metrics.keys() == {"last_score", "last_ref_kl_nats", "last_response_tokens", "last_finished_frac"}
    heard = context.events
    assert isinstance(heard, Told)
    of_steps = [figures for _, figures in heard.figures if f"{method}/loss" in figures]
    assert len(of_steps) == 4
    assert f"{method}/score" in of_steps[0]
    series = [json.loads(line) for line in (output.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in series] == [0, 0, 1, 1]
    samples = [json.loads(line) for line in (output.directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12, "all six of each iteration"
    assert all(row["prompt"].endswith("assistant\n") or "question" in row["prompt"] for row in samples)
    facts = json.loads((output.directory / "training.json").read_bytes())
    assert facts["rows"] == 4
    saved, first = (
        load_causal_model(folder / "model", dtype=torch.float32) for folder in (output.directory, tmp_path / "a")
    )
    names = dict(first.named_parameters())
    assert any(not torch.equal(value, names[name]) for name, value in saved.named_parameters())


def test_no_prompts_is_an_error_with_its_remedy(
    context: StageContext, inputs: dict[str, ArtifactRef], tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{Split.POLICY.value}.jsonl").write_bytes(b"")
    empty = {**inputs, "dataset": commit(context.store, tmp_path / "d", "dataset")}
    with pytest.raises(DataError, match="holds no prompts") as caught:
        group.run(validate(group.GrpoConfig, QUICK, where="test"), empty, context)
    assert "filter.split.fractions.policy" in caught.value.next_step


@pytest.mark.parametrize("method", CONFIGS)
def test_a_run_can_have_the_method_as_a_candidate(method: str) -> None:
    config = load(PRESETS / "methods" / f"{method}.yaml", RunConfig).value
    candidate = config.all_candidates()[method]
    assert isinstance(candidate, CONFIGS[method])
    assert STAGES[candidate.method].run is group.run
    assert STAGES[candidate.method].is_training
