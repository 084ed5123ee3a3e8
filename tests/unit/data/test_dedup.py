"""Duplicates, contradictions and ties, on rows small enough to see."""

from __future__ import annotations

from pipeline_lib.data.dedup import find_contradictions, find_duplicates, find_ties, row_keys
from pipeline_lib.schema import Message, Origin, Record, Response


def record(prompt: str, *texts: str, ranks: tuple[int, ...] = (), line: int = 1) -> Record:
    if len(texts) >= 2 and not ranks:
        ranks = tuple(range(1, len(texts) + 1))
    responses = tuple(Response(content=text) for text in texts)
    origin = Origin(source="s", place="f", line=line)
    return Record.create((Message(role="user", content=prompt),), responses, ranks, origin=origin)


def test_the_first_of_equal_rows_is_kept() -> None:
    rows = [
        record("p", "a", line=1),
        record("P ", " A", line=2),  # looks the same
        record("p", "b", line=3),
        record("p", line=4),  # a prompt, not a demonstration
        record("p", "a", "b", line=5),
        record("p", "b", "a", ranks=(2, 1), line=6),  # the same preference, told in another order
        record("p", "b", "a", line=7),  # the opposite: no duplicate
    ]
    refused = find_duplicates([row_keys(row) for row in rows], range(len(rows)))
    assert {index: refusal.reason for index, refusal in refused.items()} == {
        1: "the same row as f:1",
        5: "the same row as f:5",
    }


def test_both_sides_of_a_contradiction_go() -> None:
    rows = [
        record("p", "a", "b", line=1),
        record("p", "B", "a", line=2),
        record("q", "b", "a", line=3),  # another prompt
        record("p", "a", "c", line=4),
        record("p", "c", "x", "a", line=5),  # contradicts line 4 with one of its pairs
        record("p", "a", "b", ranks=(1, 1), line=6),  # a tie claims nothing
    ]
    refused = find_contradictions([row_keys(row) for row in rows], range(len(rows)))
    assert {index: refusal.reason for index, refusal in refused.items()} == {
        0: "f:2 prefers the opposite",
        1: "f:1 prefers the opposite",
        3: "f:5 prefers the opposite",
        4: "f:4 prefers the opposite",
    }


def test_only_living_rows_count() -> None:
    keys = [row_keys(record("p", "a", "b")), row_keys(record("p", "b", "a"))]
    assert find_contradictions(keys, [0]) == {}
    assert find_duplicates([keys[0], keys[0]], [1]) == {}


def test_a_row_that_prefers_nothing_is_a_tie() -> None:
    rows = [record("p", "a", "b", ranks=(1, 1)), record("p", "a", "b", "c", ranks=(1, 1, 2)), record("p", "a")]
    refused = find_ties([row_keys(row) for row in rows], range(3))
    assert list(refused) == [0]
    assert refused[0].code == "E_TIE"
