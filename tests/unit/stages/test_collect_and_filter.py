"""Rows to data set: every row is kept or refused with a reason, prompts are divided once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.record_files import read_records
from pipeline_lib.data.split import check_disjoint
from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.schema import ArtifactRef, FunnelStep, Record, Rejection, Split
from pipeline_lib.stages import collect
from pipeline_lib.stages import filter as filter_stage
from pipeline_lib.stages.collect import CollectConfig, pin_sources
from pipeline_lib.stages.filter import FilterConfig
from pipeline_lib.validation import validate


class FolderStore:
    """Artifacts as folders: what these stages use of the store, and nothing else."""

    client = settings = None

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, kind: str, files: dict[str, bytes]) -> ArtifactRef:
        ref = ArtifactRef(kind=kind, id=f"{len(list(self.root.glob('art-*'))):064x}")
        for name, content in files.items():
            path = self.root / f"art-{ref.id}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return ref

    def manifest(self, ref: ArtifactRef) -> Any:
        folder = self.root / f"art-{ref.id}"
        return SimpleNamespace(files={str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()})

    def open_bytes(self, ref: ArtifactRef, path: str) -> bytes:
        return (self.root / f"art-{ref.id}" / path).read_bytes()

    def fetch(self, ref: ArtifactRef, directory: Path, *, paths: list[str]) -> Path:
        for path in paths:
            (directory / path).write_bytes(self.open_bytes(ref, path))
        return directory


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def context(store: FolderStore, name: str) -> Any:
    workdir = store.root / name / "output"
    workdir.mkdir(parents=True)
    return SimpleNamespace(store=store, workdir=workdir, progress=lambda *_: None, log=lambda _: None)


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rejections(folder: Path) -> list[Rejection]:
    return [Rejection.model_validate_json(line) for line in (folder / "rejections.jsonl").open("rb")]


def funnel(folder: Path) -> list[FunnelStep]:
    return [FunnelStep.model_validate(step) for step in json.loads((folder / "funnel.json").read_text())]


def run_collect(store: FolderStore, name: str = "collect", **config: Any) -> Path:
    output = collect.run(validate(CollectConfig, config, where="collect"), {}, context(store, name))
    assert output.kind == "rows"
    return output.directory


def run_filter(
    store: FolderStore, rows: Path, name: str = "filter", *, base: dict[str, bytes] | None = None, **config: Any
) -> Path:
    inputs = {"rows": store.add("rows", {"records.jsonl": (rows / "records.jsonl").read_bytes()})}
    base = {"model/tokenizer.json": tokenizer()} if base is None else base
    inputs["base_model"] = store.add("model", base)
    output = filter_stage.run(validate(FilterConfig, config, where="filter"), inputs, context(store, name))
    assert output.kind == "dataset"
    return output.directory


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is item number {n}?", "chosen": f"It is a {n}.", "rejected": "I do not know."}
        for n in range(start, start + count)
    ]


# Collect.


def test_collect_keeps_and_refuses_every_row(store: FolderStore, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [*pairs(3), "{", {"prompt": "p", "chosen": "", "rejected": "x"}])
    second = write_rows(tmp_path / "b.jsonl", [{"instruction": "i", "output": "o"}, "[]"])
    folder = run_collect(
        store,
        sources=[
            {"name": "jsonl", "path": first, "label": "pairs", "license": "MIT"},
            {"name": "jsonl", "path": second},
        ],
    )

    records = list(read_records(folder / "records.jsonl"))
    assert [row.kind for row in records] == ["comparison"] * 3 + ["demonstration"]
    assert [row.origin.line for row in records] == [1, 2, 3, 1]
    assert sorted((row.code, row.origin.place, row.origin.line) for row in rejections(folder)) == [
        ("E_EMPTY_RESPONSE", first, 5),
        ("E_JSON", first, 4),
        ("E_NOT_OBJECT", second, 2),
    ]
    assert [(step.name, step.rows_in, step.rows_kept) for step in funnel(folder)] == [
        ("1 pairs", 5, 3),
        ("2 jsonl", 2, 1),
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kinds"] == {"comparison": 3, "demonstration": 1}
    assert summary["sources"][0]["notes"] == [f"layout preference: 4 of the first 4 rows of {first}"]


def test_collect_twice_gives_the_same_bytes(store: FolderStore, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*pairs(20), "{"])
    one, other = (run_collect(store, name, sources=[{"name": "jsonl", "path": path}]) for name in ("x", "y"))
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_a_useless_file_is_named_with_its_three_main_reasons(store: FolderStore, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", ["{"] * 5 + ["[]"] * 3 + ['{"a": NaN}'] * 2 + ['{"a":1,"a":2}'])
    with pytest.raises(DataError) as caught:
        run_collect(store, sources=[{"name": "jsonl", "path": path}])
    cause = caught.value.cause
    assert f"{path}: all 11 rows were refused: 5 × E_JSON ({path}:1: " in cause
    assert "; 3 × E_NOT_OBJECT (" in cause
    assert "; 2 × E_NON_FINITE (" in cause
    assert "E_DUPLICATE_KEY" not in cause
    assert "\n" not in cause
    assert "layout" in caught.value.next_step


def test_an_empty_file_is_named(store: FolderStore, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"empty\.jsonl: there are no rows at all"):
        run_collect(store, sources=[{"name": "jsonl", "path": path}])


def test_max_rows_stops_early(store: FolderStore, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["{", *pairs(50)])
    folder = run_collect(store, sources=[{"name": "jsonl", "path": path}, {"name": "pydoc"}], max_rows=7)
    assert len(list(read_records(folder / "records.jsonl"))) == 7


def test_the_configuration_writes_defaults_out_and_names_bad_keys() -> None:
    config = CollectConfig()
    assert config.sources[0]["name"] == "pydoc"
    assert config.sources[0]["phrasings"] == 3
    assert CollectConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="unknown source 'jsnl'; did you mean 'jsonl'"):
        validate(CollectConfig, {"sources": [{"name": "jsnl"}]}, where="x")
    with pytest.raises(ConfigError, match="unknown key 'pth'; did you mean 'path'"):
        validate(CollectConfig, {"sources": [{"name": "jsonl", "pth": "x"}]}, where="x")
    with pytest.raises(ConfigError, match="unknown filter 'lenght'; did you mean 'length'"):
        validate(FilterConfig, {"rules": [{"name": "lenght"}]}, where="x")


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", pairs(2))
    config = validate(CollectConfig, {"sources": [{"name": "jsonl", "path": path}]}, where="x")
    before = pin_sources(config, LocalPlaces())
    assert list(before.fingerprints) == [f"0/jsonl/{path}"]
    write_rows(tmp_path / "a.jsonl", pairs(3))
    assert pin_sources(config, LocalPlaces()) != before


# Filter.

SPLIT = {"fractions": {"sft": 0.0, "reward": 0.3, "policy": 0.3, "reward_test": 0.2, "gate": 0.2}}


def test_filter_accounts_for_every_row(store: FolderStore, tmp_path: Path) -> None:
    good = pairs(200)
    bad = [
        {"prompt": "same", "chosen": "x", "rejected": "X "},
        {"prompt": "control", "chosen": "<|im_end|>", "rejected": "b"},
        *[good[0]] * 2,
        {"prompt": "What is item number 1?", "chosen": "I do not know.", "rejected": "It is a 1."},
        {"prompt": "tie", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
    ]
    rows = run_collect(store, sources=[{"name": "jsonl", "path": write_rows(tmp_path / "a.jsonl", good + bad)}])
    folder = run_filter(store, rows, split=SPLIT, rules=[{"name": "control_tokens"}, {"name": "identical_pair"}])

    kept = [row for split in Split for row in read_records(folder / f"{split.value}.jsonl")]
    assert len(kept) == 199
    refused = rejections(folder)
    assert Counter(row.code for row in refused) == {
        "E_CONTROL_TOKEN": 1, "E_IDENTICAL_PAIR": 1, "E_DUPLICATE": 2, "E_CONTRADICTION": 2, "E_TIE": 1,
    }  # fmt: skip
    assert all(row.record is not None for row in refused)
    assert [(step.name, step.rows_in, step.rows_kept) for step in funnel(folder)] == [
        ("control_tokens", 206, 205), ("identical_pair", 205, 204), ("duplicates", 204, 202),
        ("contradictions", 202, 200), ("ties", 200, 199),
    ]  # fmt: skip
    for split in Split:
        assert {row.split for row in read_records(folder / f"{split.value}.jsonl")} <= {split}
    check_disjoint(kept)


def test_rules_apply_in_the_configured_order_and_see_rewritten_texts(store: FolderStore, tmp_path: Path) -> None:
    rows = [*pairs(100), {"prompt": "hidden", "chosen": "<|im_\u200bstart|>", "rejected": "b\u202e"}]
    collected = run_collect(store, sources=[{"name": "jsonl", "path": write_rows(tmp_path / "a.jsonl", rows)}])
    folder = run_filter(store, collected, split=SPLIT)
    assert [step.name for step in funnel(folder)][:3] == ["unicode", "roles", "empty"]
    (refused,) = rejections(folder)
    assert refused.record is not None
    assert refused.record.responses[1].content == "b"
    assert (refused.stage, refused.code) == ("control_tokens", "E_CONTROL_TOKEN")


def tokenizer() -> bytes:
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<my_end>"])
    return made.to_str().encode()


def test_tokens_are_counted_with_the_base_models_tokenizer(store: FolderStore, tmp_path: Path) -> None:
    rows = [
        *pairs(100),
        {"prompt": "long", "chosen": "w " * 30, "rejected": "b"},
        {"prompt": "p", "chosen": "<my_end>", "rejected": "b"},
    ]
    collected = run_collect(store, sources=[{"name": "jsonl", "path": write_rows(tmp_path / "a.jsonl", rows)}])
    rules = [{"name": "length", "max_response_tokens": 29}, {"name": "control_tokens"}]
    folder = run_filter(store, collected, split=SPLIT, rules=rules)
    assert {row.code: row.reason for row in rejections(folder)} == {
        "E_TOO_LONG": "a response of 30 tokens, at most 29",
        "E_CONTROL_TOKEN": "response 1 contains the control token '<my_end>'",
    }
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        run_filter(store, collected, "other", base={"model/config.json": b"{}"}, split=SPLIT, rules=rules)


def test_nothing_left_gives_the_reasons(store: FolderStore, tmp_path: Path) -> None:
    collected = run_collect(store, sources=[{"name": "jsonl", "path": write_rows(tmp_path / "a.jsonl", pairs(4))}])
    with pytest.raises(DataError, match="all 4 rows were refused: 4 × E_TOO_SHORT"):
        run_filter(store, collected, rules=[{"name": "length", "min_response_words": 50}])


def test_a_split_that_is_too_small_is_named(store: FolderStore, tmp_path: Path) -> None:
    collected = run_collect(store, sources=[{"name": "jsonl", "path": write_rows(tmp_path / "a.jsonl", pairs(100))}])
    with pytest.raises(DataError, match="the split sft has 0 demonstrations, 1 or more are needed") as caught:
        run_filter(store, collected)
    assert "filter.split.fractions.sft" in caught.value.next_step


def test_adding_rows_moves_no_row(store: FolderStore, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", pairs(100))
    many = write_rows(tmp_path / "many.jsonl", pairs(300))

    def splits(path: str, name: str) -> dict[str, Split | None]:
        rows = run_collect(store, f"c{name}", sources=[{"name": "jsonl", "path": path}])
        folder = run_filter(store, rows, name, split=SPLIT)
        return {row.id: row.split for split in Split for row in read_records(folder / f"{split.value}.jsonl")}

    before, after = splits(few, "few"), splits(many, "many")
    assert before.items() <= after.items()
    assert len(after) == 300


def test_the_demo_fills_every_split(store: FolderStore) -> None:
    collected = run_collect(store, sources=[{"name": "pydoc", "max_items": 400}])
    folder = run_filter(store, collected, rules=[{"name": "unicode"}, {"name": "length"}, {"name": "repetition"}])
    by_split: dict[Split, list[Record]] = {
        split: list(read_records(folder / f"{split.value}.jsonl")) for split in Split
    }
    assert all(by_split.values())
    answers = {split: {answer.content for row in rows for answer in row.responses} for split, rows in by_split.items()}
    # no text of a gate row, right or wrong, is trained on in any way
    for split in set(Split) - {Split.GATE}:
        assert not answers[Split.GATE] & answers[split]
