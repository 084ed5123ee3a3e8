"""Files that people label: what they are given, what is read of them, and which lines are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data.layouts import detect, map_ranked
from pipeline_lib.errors import DataError
from pipeline_lib.feedback.annotation import LabelItem, PeoplesLabels, read_labels, write_items
from pipeline_lib.schema import Message

ITEMS = [
    LabelItem((Message(role="user", content="Why?"),), ("Because.", "  ")),
    LabelItem((Message(role="user", content="What\u2028now?"),), ("This.", "That.", "Both.")),
]


def written(path: Path, *changes: dict[str, Any]) -> PeoplesLabels:
    """Write the items, each row changed in one way, and read the file."""
    rows = [item.row() | change for item, change in zip(ITEMS, changes, strict=False)] + list(changes[len(ITEMS) :])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labels(path, ITEMS)


def test_the_file_waits_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "labels.jsonl"
    write_items(path, ITEMS)
    assert [entry.name for entry in path.parent.iterdir()] == ["labels.jsonl"]
    assert read_labels(path, ITEMS).waiting == [f"{path}:1", f"{path}:2"]
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert [row["responses"] for row in rows] == [["Because.", "  "], ["This.", "That.", "Both."]]
    rows[1]["ranks"] = [2, 1, 2]
    assert detect(rows[1]) == "ranked", "collect reads it too"
    assert map_ranked(rows[1]).ranks == (2, 1, 2)


def test_what_no_file_can_hold_is_shown_as_a_sign(tmp_path: Path) -> None:
    path, item = tmp_path / "labels.jsonl", LabelItem(ITEMS[0].prompt, ("a\0b", "c"))
    write_items(path, [item])
    row = json.loads(path.read_text())
    assert row["responses"] == ["a\ufffdb", "c"]
    path.write_text(json.dumps(row | {"ranks": [2, 1]}))
    assert read_labels(path, [item]).ranks == {item.key: (2, 1)}


def test_what_people_wrote_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("mine")
    write_items(path, ITEMS)
    assert path.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_labels_are_ranks_scores_or_a_skip(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    found = written(path, {"ranks": [2, 1]}, {"scores": [0.5, 9, 0.5], "note": "hard"})
    assert found.waiting == []
    assert found.ranks == {ITEMS[0].key: (2, 1), ITEMS[1].key: (2, 1, 2)}
    found = written(path, {"skip": True}, {"ranks": [1, 1, 3]})
    assert found.ranks == {ITEMS[0].key: None, ITEMS[1].key: (1, 1, 2)}


def test_rows_that_are_missing_wait_too(tmp_path: Path) -> None:
    found = written(tmp_path / "labels.jsonl", {"ranks": [1, 2]})
    assert found.waiting == [f"{tmp_path}/labels.jsonl: no row of key {ITEMS[1].key[:12]}"]


def test_a_row_that_waits_beside_a_labelled_one_of_its_key_does_not_wait(tmp_path: Path) -> None:
    found = written(tmp_path / "labels.jsonl", {}, {"ranks": [1, 2, 3]}, ITEMS[0].row() | {"ranks": [2, 1]})
    assert found.waiting == []
    assert found.ranks[ITEMS[0].key] == (2, 1)


def test_a_row_may_be_there_twice_but_not_say_two_things(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    again = ITEMS[0].row() | {"ranks": [1, 2]}
    found = written(path, {"ranks": [1, 2]}, {"ranks": [1, 2, 3]}, again)
    assert found.ranks[ITEMS[0].key] == (1, 2)
    with pytest.raises(DataError, match=r"labels.jsonl:3: contradicts line 1: ranks \[2, 1\]"):
        written(path, {"ranks": [1, 2]}, {"ranks": [1, 2, 3]}, again | {"ranks": [2, 1]})
    with pytest.raises(DataError, match=r"labels.jsonl:3: contradicts line 1: skip"):
        written(path, {"ranks": [1, 2]}, {"ranks": [1, 2, 3]}, again | {"skip": True})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"key": "0" * 64, "ranks": [1, 2]}, r":1: its key is none of the sampled responses'"),
        ({"key": None, "ranks": [1, 2]}, r":1: its key is none"),
        ({"ranks": [1, 2, 3]}, r":1: E_RANKS: 3 ranks for 2 responses"),
        ({"ranks": "first"}, r":1: E_TYPE: ranks is .*, not a list"),
        ({"ranks": [1, True]}, r":1: E_TYPE: ranks holds"),
        ({"ranks": [1, 2], "scores": [1, 2]}, r":1: E_SCORE_ORDER"),
        ({"ranks": [1, 2], "responses": ["  ", "Because."]}, r":1: E_RANKS: the responses are not those"),
        ({"skip": "yes"}, r":1: E_TYPE: skip is neither true nor false"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        written(tmp_path / "labels.jsonl", change, {"ranks": [1, 2, 3]})


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(ITEMS[0].row() | {"ranks": [1, 2]}) + "\n{half\n" + "[1]\n")
    with pytest.raises(DataError, match=r"labels.jsonl:2: E_\w+: .*; .*labels.jsonl:3: E_"):
        read_labels(path, ITEMS)


def test_a_file_of_gold_labels_may_be_about_more_and_about_less(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    rows = [ITEMS[1].row() | {"ranks": [3, 1, 2]}, {"key": "other", "ranks": [1, 2]}, ITEMS[0].row()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_labels(path, ITEMS, is_partial=True)
    assert (found.ranks, found.waiting) == ({ITEMS[1].key: (3, 1, 2)}, [])


def test_the_key_is_of_the_texts_in_their_order() -> None:
    # From sha256sum over [[["user","Why?"]],["a","b"]].
    item = LabelItem((Message(role="user", content="Why?"),), ("a", "b"))
    assert item.key == KEY
    assert LabelItem(item.prompt, ("b", "a")).key != item.key


KEY = "e8bb8bf2e2cfccb38d24b7016ff3c330394cfbb0fabb96197bda1c06af3dc848"
