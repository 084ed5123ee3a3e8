"""Whatever the bytes: no traceback, no row lost, every place right."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_lib.data.mapping import FieldMapping, map_rows
from pipeline_lib.data.read import RawRow, ReadLimits, read_jsonl
from pipeline_lib.hashing import canonical_json
from pipeline_lib.schema import Origin, Rejection

ORIGIN = Origin(source="s", place="f")
GOOD_ROWS = [
    {"prompt": "a", "response": "b"},
    {"messages": [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "😀"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "p", "responses": ["x", "y"], "scores": [1, 0.5]},
    {"instruction": "i", "input": "", "output": "o"},
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
rows = st.sampled_from(GOOD_ROWS) | st.dictionaries(
    st.sampled_from(["prompt", "response", "chosen", "rejected", "messages", "responses", "ranks", "group"]),
    json_values,
)


def as_lines(values: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def read(content: bytes, **limits: int) -> list[RawRow | Rejection]:
    return list(read_jsonl(io.BytesIO(content), origin=ORIGIN, limits=ReadLimits(**limits)))


def check_places(content: bytes, found: list[RawRow | Rejection]) -> None:
    """Every result lies at the line and byte it names; lines rise; no line with text is left out."""
    lines = content.split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    numbers = [one.line if isinstance(one, RawRow) else one.origin.line for one in found]
    assert numbers == sorted(set(numbers))
    assert [starts[number - 1] for number in numbers] == [one.byte_offset for one in found]
    assert set(numbers) == {number for number, line in enumerate(lines, start=1) if line.strip()}


@given(st.lists(rows, max_size=20))
@settings(max_examples=150, deadline=None)
def test_rows_in_are_accepted_plus_rejected(values: list[dict[str, Any]]) -> None:
    found = read(as_lines(values))
    assert len(found) == len(values)
    mapped = list(map_rows(found, FieldMapping(), origin=lambda: ORIGIN, note=lambda _: None))
    assert len(mapped) == len(values)
    for row in mapped:
        canonical_json(row.model_dump(mode="json"))


@given(st.lists(rows, min_size=1, max_size=8), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_lose_no_row(values: list[dict[str, Any]], data: st.DataObject) -> None:
    content = bytearray(as_lines(values))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not content:
            return
    found = read(bytes(content))
    if any(isinstance(one, Rejection) and one.code in ("E_UTF16", "E_NOT_JSONL") for one in found):
        assert len(found) == 1
    elif not content.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no part of the first row
        check_places(bytes(content), found)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_no_traceback(content: bytes) -> None:
    mapped = map_rows(read(content), FieldMapping(), origin=lambda: ORIGIN, note=lambda _: None)
    for row in mapped:
        row.model_dump_json().encode("utf-8")


@given(st.lists(rows, min_size=1, max_size=8), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_gzip_gives_no_traceback(values: list[dict[str, Any]], data: st.DataObject) -> None:
    packed = bytearray(gzip.compress(as_lines(values), mtime=0))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(packed)))
    read(bytes(packed))
    found = read(bytes(gzip.compress(as_lines(values), mtime=0)[:cut]))
    assert len(found) <= len(values) + 1


@given(st.lists(st.binary(min_size=0, max_size=5000), max_size=5))
@settings(max_examples=50, deadline=None)
def test_no_more_than_the_limit_is_kept(parts: list[bytes]) -> None:
    content = b"\n".join(part.replace(b"\n", b"") for part in parts)
    for one in read(content, max_row_bytes=1024):
        if isinstance(one, Rejection) and one.code == "E_OVERSIZE_ROW":
            line = content.split(b"\n")[one.origin.line - 1]
            assert len(line) > 1024
