"""Parquet rows: good files, streams that do not seek, damaged files, odd values."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline_lib.data.read import RawRow
from pipeline_lib.data.read_parquet import read_parquet
from pipeline_lib.schema import Origin, Rejection

ORIGIN = Origin(source="s", place="f")


def packed(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


class NoSeek(io.RawIOBase):
    def __init__(self, content: bytes) -> None:
        self._inner = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._inner.read(size)


def read(content: bytes, *, can_seek: bool = True) -> list[RawRow | Rejection]:
    stream: Any = io.BytesIO(content) if can_seek else NoSeek(content)
    return list(read_parquet(stream, origin=ORIGIN))


@pytest.mark.parametrize("can_seek", [True, False])
def test_rows_and_numbers(can_seek: bool) -> None:
    table = pa.table({"prompt": [f"p{n}" for n in range(200)], "n": range(200)})
    rows = read(packed(table), can_seek=can_seek)
    assert [row.line for row in rows if isinstance(row, RawRow)] == list(range(1, 201))
    assert rows[150] == RawRow({"prompt": "p150", "n": 150}, 151)


def test_nested_messages() -> None:
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    (row,) = read(packed(pa.table({"messages": messages})))
    assert isinstance(row, RawRow)
    assert row.values == {"messages": messages[0]}


def test_text_that_is_no_utf8_spoils_its_own_row() -> None:
    texts = pa.array([b"good", b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    rows = read(packed(pa.table({"prompt": texts})))
    assert [row.code if isinstance(row, Rejection) else "ok" for row in rows] == ["ok", "E_ENCODING", "ok"]


def test_nul_is_refused() -> None:
    rows = read(packed(pa.table({"prompt": ["a\0b", "c"]})))
    assert [row.code if isinstance(row, Rejection) else "ok" for row in rows] == ["E_NUL", "ok"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\xff" * 100 + b"PAR1"])
def test_what_is_no_parquet_is_one_rejection(content: bytes) -> None:
    (rejection,) = read(content)
    assert isinstance(rejection, Rejection)
    assert rejection.code == "E_PARQUET"
    assert rejection.origin.line == 1


def test_damage_anywhere_gives_no_traceback(tmp_path: Path) -> None:
    content = packed(pa.table({"prompt": [f"question number {n}" for n in range(50)]}))
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x5A
        read(bytes(damaged))
        read(content[:place])
