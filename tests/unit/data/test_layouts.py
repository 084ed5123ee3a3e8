"""Each layout on rows of its kind, and the real data sets."""

from __future__ import annotations

import collections
import gzip
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data.layouts import LAYOUTS, detect
from pipeline_lib.data.mapping import FieldMapping, map_rows
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.read import RawRow
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.schema import Origin, Record, Rejection

SHARED_DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def shown(record: Record) -> tuple[list[tuple[str, str]], list[str], list[int]]:
    turns = [(turn.role, turn.content) for turn in record.messages]
    return turns, [answer.content for answer in record.responses], list(record.ranks)


def map_one(values: dict[str, Any], **mapping: Any) -> list[Record | Rejection]:
    origin = Origin(source="s", place="f")
    rows = [RawRow(values, 1, 0)]
    return list(map_rows(rows, FieldMapping(**mapping), origin=lambda: origin, note=lambda _: None))


def only(values: dict[str, Any], **mapping: Any) -> Record:
    (record,) = map_one(values, **mapping)
    assert isinstance(record, Record), record
    return record


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"

EXPECTED: list[tuple[str, dict[str, Any], tuple[list[tuple[str, str]], list[str], list[int]]]] = [
    ("prompt_completion", {"prompt": "p", "completion": "c"}, ([("user", "p")], ["c"], [])),
    ("prompt_completion", {"question": "p", "answer": "c"}, ([("user", "p")], ["c"], [])),
    ("rated", {"prompt": "p", "completion": "c", "label": False}, ([("user", "p")], ["c"], [])),
    (
        "prompt_completion",
        {"prompt": [{"role": "system", "content": "s"}, user("p")], "completion": [assistant("c")]},
        ([("system", "s"), ("user", "p")], ["c"], []),
    ),
    (
        "messages",
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
        ([("user", "a"), ("assistant", "b"), ("user", "c")], ["d"], []),
    ),
    (
        "messages",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        ([("user", "a")], ["b"], []),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, assistant("b")]},
        ([("user", "a")], ["b"], []),
    ),
    ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, ([("user", "i\n\nx")], ["o"], [])),
    ("alpaca", {"instruction": "i", "input": "<noinput>", "output": "o"}, ([("user", "i")], ["o"], [])),
    ("alpaca", {"instruction": "i", "context": "x", "response": "o"}, ([("user", "i\n\nx")], ["o"], [])),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}, ([("user", "p")], ["a", "b"], [1, 2])),
    (
        "preference",
        {"prompt": "p", "chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")],
         "score_chosen": 3, "score_rejected": 3.0},
        ([("user", "p")], ["a", "b"], [1, 1]),
    ),
    (
        "preference",
        {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("b")]},
        ([("user", "p")], ["a", "b"], [1, 2]),
    ),
    (
        "preference",
        {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ([("user", "p")], ["a", "b"], [1, 2]),
    ),
    (
        "hh",
        {"chosen": f"{HH_PROMPT} Because.", "rejected": f"{HH_PROMPT} No idea.\n"},
        ([("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")], ["Because.", "No idea."], [1, 2]),
    ),
    ("prompt", {"prompt": "p"}, ([("user", "p")], [], [])),
    (
        "prompt", {"prompt": HH_PROMPT},
        ([("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")], [], []),
    ),
    (
        "ranked", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
        ([("user", "p")], ["a", "b", "c"], [2, 1, 2]),
    ),
    (
        "ranked", {"prompt": "p", "responses": [{"text": "a"}, {"content": "b"}, "c"], "scores": [0.1, 7, 0.1]},
        ([("user", "p")], ["a", "b", "c"], [2, 1, 2]),
    ),
    (
        "ranked",
        {"question": "q", "answers": [{"text": "a", "upvotes": 7}, {"text": "b", "upvotes": 3, "accepted": True},
                                      {"text": "c", "upvotes": -1}]},
        ([("user", "q")], ["a", "b", "c"], [1, 1, 2]),
    ),
    (
        "compared", {"question": "q", "prediction 1": "a", "prediction 2": "b", "prediction 3": "c",
                     "preference": [2, 0, 1]},
        ([("user", "q")], ["a", "b", "c"], [2, 1, 2]),
    ),
    (
        "systems",
        {"question_text": "q", "systems": {"x": {"response": "a", "overall": {"overall-ranking": 2}},
                                           "human": {"response": "b", "overall": {"overall-ranking": 1}}}},
        ([("user", "q")], ["a", "b"], [2, 1]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "values", "expected"), EXPECTED)
def test_layout_is_found_and_mapped(layout: str, values: dict[str, Any], expected: Any) -> None:
    assert detect(values) == layout
    assert shown(only(values)) == expected
    assert shown(only(values, layout=layout)) == expected


def test_a_label_makes_a_rated_row_that_is_no_demonstration() -> None:
    good, bad = (only({"prompt": "p", "completion": "c", "label": label}) for label in (True, False))
    assert (good.kind, good.desirable) == ("rated", True)
    assert (bad.kind, bad.desirable) == ("rated", False)
    assert len({good.id, bad.id, only({"prompt": "p", "completion": "c"}).id}) == 3


def test_every_layout_has_an_example() -> None:
    assert {layout for layout, _, _ in EXPECTED} == set(LAYOUTS)


def test_fields_rename_and_do_not_leak() -> None:
    values = {"question": "q", "reply": "r", "prompt": "not this"}
    record = only(values, fields={"prompt": "question", "response": "reply"}, layout="prompt_completion")
    assert shown(record) == ([("user", "q")], ["r"], [])


def test_group_is_named_after_its_source() -> None:
    assert only({"prompt": "p", "dialogue": 7}, fields={"group": "dialogue"}).group == "s:7"


def test_chosen_can_be_demonstrated() -> None:
    values = {"prompt": "p", "chosen": "a", "rejected": "b"}
    comparison, demonstration = map_one(values, demonstrate_chosen=True)
    assert isinstance(demonstration, Record)
    assert shown(demonstration) == ([("user", "p")], ["a"], [])
    assert demonstration.group == comparison.group


def test_a_tie_is_no_demonstration() -> None:
    values = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1}
    assert len(map_one(values, demonstrate_chosen=True)) == 1


def test_layout_is_that_of_most_of_the_first_rows() -> None:
    rows = [
        RawRow({"prompt": "p"}, 1),
        *(RawRow({"instruction": "i", "output": "o"}, n) for n in range(2, 20)),
    ]
    notes: list[str] = []
    origin = Origin(source="s", place="f")
    found = list(map_rows(rows, FieldMapping(), origin=lambda: origin, note=notes.append))
    assert [type(row) for row in found] == [Rejection] + [Record] * 18
    assert notes == ["layout alpaca: 7 of the first 8 rows of f"]


def test_id_does_not_depend_on_the_place() -> None:
    values = {"prompt": "p", "response": "r"}
    here, there = Origin(source="a", place="x", line=1), Origin(source="b", place="y", line=9)
    ids = set()
    for place in (here, there):
        mapping = FieldMapping()
        (record,) = map_rows([RawRow(values, 4)], mapping, origin=iter([place]).__next__, note=lambda _: None)
        assert isinstance(record, Record)
        ids.add(record.id)
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("name", "num_rows", "rejected"),
    [
        ("hh_rlhf/harmless-base", 1410, {"E_EMPTY_RESPONSE": 3, "E_ROLE_ORDER": 3, "E_DIVERGED": 2}),
        ("hh_rlhf/helpful-base", 1419, {"E_EMPTY_RESPONSE": 3, "E_ROLE_ORDER": 6, "E_DIVERGED": 5}),
        ("hh_rlhf/helpful-rejection-sampled", 1656, {"E_DIVERGED": 2}),
        ("dolly/dolly", 1517, {}),
        ("alpaca/alpaca_sample", 5000, {"E_EMPTY_RESPONSE": 3}),
        ("finegrained_rlhf/qa_feedback_k4", 255, {"E_CONTRADICTION": 7}),
        ("squality_ranking/human_rankings_k3", 40, {}),
        ("pandalm/pairwise_3annotators", 515, {"E_EMPTY_RESPONSE": 20, "E_EMPTY_PROMPT": 1}),
        ("tulu_human_eval/annotations", 568, {"E_TYPE": 1}),
        ("llmbar/natural", 100, {}),
    ],
)
def test_real_data_sets(name: str, num_rows: int, rejected: dict[str, int]) -> None:
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data sets are not here")
    rows = list(Jsonl(path=str(path)).rows(LocalPlaces(), lambda _: None))
    codes = collections.Counter(row.code for row in rows if isinstance(row, Rejection))
    assert len(rows) == num_rows == gzip.decompress(path.read_bytes()).count(b"\n")
    assert codes == rejected
    if name.startswith("hh_rlhf"):
        for row in rows:
            if isinstance(row, Record):
                assert row.kind == "comparison"
                assert "\n\nHuman:" not in "".join(answer.content for answer in row.responses)
