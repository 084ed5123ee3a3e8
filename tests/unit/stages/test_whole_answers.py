"""Responses that are cut lose their end: how many is told, and too many stop the stage before it trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline_lib.errors import DataError
from pipeline_lib.schema import Record, Split
from pipeline_lib.stages import sft
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.stages.rounds_config import IteratedDpoConfig, RaftConfig
from pipeline_lib.stages.sft import SftConfig
from pipeline_lib.stages.training_stage import require_whole_answers
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import validate
from tests.stage_bench import Told, commit, context_in
from tests.toy import encoder, record, settings

LIMIT = 8


def check(rows: list[Record], told: Told, **changes: Any) -> float:
    encode = encoder(max_response_tokens=LIMIT)
    config = settings(max_response_tokens=LIMIT, **changes)
    context = cast(StageContext, SimpleNamespace(log=told.log))
    return require_whole_answers([encode.tree(row) for row in rows], config, encode, context)


def test_an_answer_that_just_fits_keeps_its_end() -> None:
    told = Told()
    assert check([record("a", "1234567", "x")], told) == 0.0
    assert not told.lines


def test_few_are_told_and_many_are_refused() -> None:
    rows = [record(f"question {n}", "short", "fine") for n in range(24)] + [record("b", "12345678", "x")]
    told = Told()
    assert check(rows, told) == pytest.approx(1 / 50)
    assert told.lines == ["1 of 50 responses (2.0%) are longer than max_response_tokens = 8 and lose their end"]
    with pytest.raises(DataError, match=f"2.0%.*max_truncated_frac is 0.01; rows: {rows[-1].id[:12]}") as caught:
        check(rows, told, max_truncated_frac=0.01)
    assert "raise max_response_tokens" in caught.value.next_step


def test_rounds_train_on_answers_that_sampling_has_cut() -> None:
    assert IteratedDpoConfig().preference().max_truncated_frac == 1.0
    assert RaftConfig().sft().max_truncated_frac == 1.0
    assert SftConfig().max_truncated_frac == 0.05


@pytest.mark.servers
def test_the_share_is_a_figure_of_the_stage(directory: Path, store: ArtifactStore, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model" / "model")
    rows = [record(f"question {n}", "short") for n in range(3)] + [record("b", "too long to be kept")]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{Split.SFT.value}.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    inputs = {
        "base_model": commit(store, tmp_path / "model", "model"),
        "dataset": commit(store, tmp_path / "data", "dataset"),
    }
    values = {"max_response_tokens": LIMIT, "precision": "fp32", "max_steps": 1, "max_truncated_frac": 0.25}
    done = sft.run(validate(SftConfig, values, where="test"), inputs, context_in(tmp_path / "run", store))
    assert done.metrics["truncated_frac"] == 0.25
