"""What every source must do, over the whole table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.source import Source
from pipeline_lib.data.sources import SOURCES
from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.schema import Record, Rejection

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "d", "chosen": "e", "rejected": " "},
    {"prompt": "f", "chosen": "g", "rejected": "h"},
]
EXPECTED = {"jsonl": 3, "parquet": 3, "hugging_face": 3}


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A small configuration of each source."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "hub").mkdir()
    (tmp_path / "jsonl" / "rows.jsonl").write_text(lines)
    (tmp_path / "hub" / "train.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return {
        "jsonl": {"name": "jsonl", "path": str(tmp_path / "jsonl")},
        "parquet": {"name": "parquet", "path": str(tmp_path / "rows.parquet")},
        "hugging_face": {"name": "hugging_face", "path": str(tmp_path / "hub")},
        "pydoc": {"name": "pydoc", "modules": ["shutil", "json"]},
    }


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True, raising=False)
    datasets.disable_progress_bars()


def ignore(_: str) -> None:
    pass


@pytest.mark.parametrize("name", list(SOURCES))
def test_contract(name: str, specs: dict[str, dict[str, Any]]) -> None:
    source = SOURCES.build(specs[name])
    assert isinstance(source, BaseModel)
    assert type(source).model_config["frozen"] is True
    for field_name, field in type(source).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
    with pytest.raises(ConfigError, match="unknown key 'no_such'"):
        SOURCES.build({**specs[name], "no_such": 1})


@pytest.mark.parametrize("name", list(SOURCES))
def test_rows_are_the_same_each_time_and_can_be_written(name: str, specs: dict[str, dict[str, Any]]) -> None:
    source: Source = SOURCES.build({**specs[name], "label": "mine", "license": "CC0-1.0"})
    rows = list(source.rows(LocalPlaces(), ignore))
    assert rows == list(source.rows(LocalPlaces(), ignore))
    if name in EXPECTED:
        assert [type(row) for row in rows] == [Record, Rejection, Record] or name == "jsonl"
        assert len(rows) == EXPECTED[name]
        assert sorted(row.origin.line for row in rows) == [1, 2, 3]
        (rejection,) = [row for row in rows if isinstance(row, Rejection)]
        assert (rejection.code, rejection.origin.line) == ("E_EMPTY_RESPONSE", 2)
    for row in rows:
        assert row.origin.source == "mine"
        assert row.origin.license == "CC0-1.0"
        assert row.origin.place
        canonical_json(row.model_dump(mode="json"))
        if isinstance(row, Record):
            assert Record.model_validate_json(row.model_dump_json()) == row
            assert row.group
            assert row.split is None


@pytest.mark.parametrize("name", list(SOURCES))
def test_fingerprint_is_stable_and_names_content(name: str, specs: dict[str, dict[str, Any]]) -> None:
    source: Source = SOURCES.build(specs[name])
    found = source.fingerprint(LocalPlaces())
    assert found == source.fingerprint(LocalPlaces())
    assert found
    if name in EXPECTED:
        ((place, digest),) = found.items()
        assert hashlib.sha256(Path(place).read_bytes()).hexdigest() == digest
        Path(place).write_bytes(Path(place).read_bytes() + b"\n")
        assert source.fingerprint(LocalPlaces()) != found


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_a_missing_place_is_named(name: str, tmp_path: Path) -> None:
    source: Source = SOURCES.build({"name": name, "path": str(tmp_path / "nothing")})
    with pytest.raises(DataError, match="nothing does not exist") as caught:
        list(source.rows(LocalPlaces(), ignore))
    assert caught.value.next_step


@pytest.mark.parametrize("name", ["jsonl", "parquet", "hugging_face"])
def test_max_rows_counts_rows_read(name: str, specs: dict[str, dict[str, Any]]) -> None:
    source: Source = SOURCES.build({**specs[name], "max_rows": 2})
    assert len(list(source.rows(LocalPlaces(), ignore))) == 2


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source: Source = SOURCES.build({"name": "hugging_face", "path": "nobody/nothing-like-this"})
    for ask in (lambda: list(source.rows(LocalPlaces(), ignore)), lambda: source.fingerprint(LocalPlaces())):
        with pytest.raises(DataError, match="'nobody/nothing-like-this' cannot be had from the hub") as caught:
            ask()
        assert "download it and give the folder" in caught.value.next_step


def test_a_pinned_commit_needs_no_hub() -> None:
    source: Source = SOURCES.build({"name": "hugging_face", "path": "a/b", "revision": "0" * 40})
    assert source.fingerprint(LocalPlaces()) == {"a/b": "0" * 40}


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    rows = list(SOURCES.build({"name": "hugging_face", "path": str(tmp_path / "saved")}).rows(LocalPlaces(), ignore))
    assert len(rows) == 3


def test_a_wrong_split_is_explained(specs: dict[str, dict[str, Any]]) -> None:
    source = SOURCES.build({**specs["hugging_face"], "split": "validation"})
    with pytest.raises(DataError, match="cannot be read as split 'validation'"):
        list(source.rows(LocalPlaces(), ignore))
