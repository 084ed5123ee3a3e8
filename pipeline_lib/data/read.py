"""Read JSONL from anyone: every row becomes a `RawRow` or a `Rejection`, never a traceback.

bytes → decompressed chunks → lines (split at line feeds alone) → JSON objects. One row at a time is
in memory, at most `max_row_bytes` of it. A promise about the accepted rows: what they hold can be
written as JSON again (no NaN, no half characters, no NUL, bounded depth).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import Field

from pipeline_lib.data.refusal import BadRowError, reject_raw
from pipeline_lib.schema import Origin, Rejection
from pipeline_lib.validation import Frozen

_CHUNK_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
_MAX_DIGITS = 308
_EXCERPT_BYTES = 800
_FOREIGN_MAGIC = {
    b"\x1f\x8b": "gzip inside gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"(\xb5/\xfd": "a zstandard file",
    b"PAR1": "a Parquet file (use the source `parquet`)",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "an image",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_UTF16_STARTS = (b"\xff\xfe", b"\xfe\xff", b"{\x00", b"\x00{", b"[\x00", b"\x00[")


class ReadLimits(Frozen):
    """What a file may demand of the reader."""

    max_row_bytes: int = Field(default=8 << 20, ge=1 << 10)
    """A longer row is refused."""
    max_depth: int = Field(default=32, ge=2, le=256)
    """Deepest nesting of a row's JSON."""
    max_gzip_ratio: float = Field(default=100.0, gt=1)
    """Decompressed bytes per compressed byte beyond which a file is taken for a bomb."""
    gzip_ratio_from_bytes: int = Field(default=16 << 20, ge=1)
    """Decompressed size from which the ratio counts."""
    max_file_bytes: int = Field(default=64 << 30, ge=1)
    """Largest decompressed size of a file."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One JSON object of a file, not yet understood."""

    values: dict[str, Any]
    line: int
    """Line or row number, from 1."""
    byte_offset: int | None = None
    """Offset of the row's first byte in the decompressed file."""


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    offset: int
    content: bytes
    """The line without its end; only its start where it is oversize."""
    size_bytes: int
    is_ended: bool


def read_jsonl(stream: BinaryIO, *, origin: Origin, limits: ReadLimits | None = None) -> Iterator[RawRow | Rejection]:
    """Read the rows of a JSONL file, plain or gzip by its magic bytes and not by its name.

    Lines of white space are no rows. A file that cannot be read on (cut gzip, bomb, not text) ends
    with one rejection for the row at which it broke.

    Args:
        stream: The file, open for reading bytes; it need not be seekable.
        origin: Source, licence and place of the file, for the rejections.
        limits: What the file may demand.
    """
    limits = limits or ReadLimits()
    splitter = _Splitter(limits.max_row_bytes)
    try:
        for chunk in _sniffed(_decompressed(stream, limits)):
            for line in splitter.feed(chunk):
                if line.content.strip() or line.size_bytes > limits.max_row_bytes:
                    yield _judge(line, origin=origin, limits=limits)
    except BadRowError as error:
        rest = splitter.rest()
        yield reject_raw(
            error, origin=origin, line=rest.number, byte_offset=rest.offset, raw=rest.content[:_EXCERPT_BYTES]
        )
        return
    rest = splitter.rest()
    if rest.content.strip() or rest.size_bytes > limits.max_row_bytes:
        yield _judge(rest, origin=origin, limits=limits)


def check_values(values: dict[str, Any], *, max_depth: int) -> None:
    """Refuse a row that could not be written as JSON and UTF-8 again.

    Raises:
        BadRowError: `E_TOO_DEEP`, `E_SURROGATE` or `E_NUL`.
    """
    stack: list[tuple[Any, int]] = [(values, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict | list):
            if depth > max_depth:
                raise BadRowError("E_TOO_DEEP", f"nested deeper than {max_depth} levels")
            if isinstance(value, dict):
                stack.extend((key, depth) for key in value)
                value = value.values()
            stack.extend((inner, depth + 1) for inner in value)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise BadRowError("E_NUL", "a text holds the NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError("E_SURROGATE", f"half a character (lone surrogate) at character {error.start}") from None


def _judge(line: _Line, *, origin: Origin, limits: ReadLimits) -> RawRow | Rejection:
    try:
        if line.size_bytes > limits.max_row_bytes:
            raise BadRowError(
                "E_OVERSIZE_ROW",
                f"a row of {line.size_bytes} bytes, at most {limits.max_row_bytes} are read",
            )
        values = _parse(line)
        check_values(values, max_depth=limits.max_depth)
    except BadRowError as error:
        return reject_raw(
            error, origin=origin, line=line.number, byte_offset=line.offset, raw=line.content[:_EXCERPT_BYTES]
        )
    return RawRow(values, line.number, line.offset)


def _parse(line: _Line) -> dict[str, Any]:
    """Parse one line strictly; what went wrong in an unended last line is called a truncation."""
    content = line.content
    try:
        if b"\0" in content:
            raise BadRowError("E_NUL", f"a NUL byte at byte {content.index(0)} of the row")
        value = _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        if not line.is_ended and error.reason == "unexpected end of data":
            raise BadRowError("E_TRUNCATED_ROW", "the last row ends inside a character") from None
        raise BadRowError(
            "E_ENCODING", f"not UTF-8 at byte {error.start} of the row ({error.reason}); convert the file"
        ) from None
    except json.JSONDecodeError as error:
        raise _json_problem(error, line) from None
    except RecursionError:
        raise BadRowError("E_TOO_DEEP", "nested too deep to be parsed") from None
    if not isinstance(value, dict):
        raise BadRowError("E_NOT_OBJECT", f"the row is a JSON {_kind(value)}, not an object")
    return value


def _json_problem(error: json.JSONDecodeError, line: _Line) -> BadRowError:
    text = error.doc.strip()
    if error.msg.startswith("Extra data"):
        if error.doc[error.pos :].lstrip().startswith(("{", "[")):
            return BadRowError("E_TWO_OBJECTS", f"a second value begins at character {error.pos}; one object a line")
        return BadRowError("E_JSON", f"text after the object at character {error.pos}")
    if text in ("{", "["):
        return BadRowError("E_JSON", "a bare bracket: pretty-printed JSON; write one object a line")
    is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
    if is_cut and not line.is_ended:
        return BadRowError("E_TRUNCATED_ROW", f"the last row is cut off: {error.msg}")
    return BadRowError("E_JSON", f"no JSON: {error.msg} at character {error.pos}")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "array"
    return "null" if value is None else type(value).__name__


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRowError("E_DUPLICATE_KEY", f"the key {twice!r} comes twice")
    return values


def _refuse_constant(word: str) -> Any:
    raise BadRowError("E_NON_FINITE", f"{word} is not a JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadRowError("E_NON_FINITE", f"{digits[:20]} is beyond the largest number")
    return value


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise BadRowError("E_NUMBER_RANGE", f"an integer of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_constant=_refuse_constant,
    parse_float=_finite_float,
    parse_int=_bounded_int,
)


class _Splitter:
    """Cuts chunks into lines and keeps at most one row's bytes."""

    def __init__(self, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes
        self._number = 1
        self._offset = 0
        self._kept = bytearray()
        self._size_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[_Line]:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._keep(chunk, start, end)
            yield self._line(is_ended=True)
            self._offset += self._size_bytes + 1
            self._number += 1
            self._kept.clear()
            self._size_bytes = 0
            start = end + 1
        self._keep(chunk, start, len(chunk))

    def rest(self) -> _Line:
        """Return what follows the last line end."""
        return self._line(is_ended=False)

    def _keep(self, chunk: bytes, start: int, end: int) -> None:
        room = self._max_row_bytes + len(_BOM) - len(self._kept)
        self._kept += chunk[start : min(end, start + max(room, 0))]
        self._size_bytes += end - start

    def _line(self, *, is_ended: bool) -> _Line:
        content = bytes(self._kept)
        if self._number == 1:
            content = content.removeprefix(_BOM)
        return _Line(self._number, self._offset, content.removesuffix(b"\r"), self._size_bytes, is_ended)


def _sniffed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Refuse what is plainly another kind of file, before millions of rows are refused one by one."""
    head = next(chunks, b"")
    if head.startswith(_UTF16_STARTS):
        raise BadRowError("E_UTF16", "the file is UTF-16 text; convert it to UTF-8")
    for magic, kind in _FOREIGN_MAGIC.items():
        if head.startswith(magic):
            raise BadRowError("E_NOT_JSONL", f"the file is {kind}, not JSONL")
    yield head
    yield from chunks


def _decompressed(stream: BinaryIO, limits: ReadLimits) -> Iterator[bytes]:
    """Yield the file's bytes in chunks, the first at least as long as any magic where there is as much."""
    head = _fill(stream)
    chunks = _gunzipped(head, stream, limits) if head.startswith(b"\x1f\x8b") else _plain(head, stream)
    total_bytes = 0
    for chunk in chunks:
        total_bytes += len(chunk)
        if total_bytes > limits.max_file_bytes:
            raise BadRowError("E_OVERSIZE_FILE", f"the file is longer than {limits.max_file_bytes} bytes")
        yield chunk


def _plain(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    yield head
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _fill(stream: BinaryIO) -> bytes:
    """Read a first chunk; a network stream may give fewer bytes than asked for."""
    head = b""
    while len(head) < 16 and (more := stream.read(_CHUNK_BYTES)):
        head += more
    return head


def _gunzipped(head: bytes, stream: BinaryIO, limits: ReadLimits) -> Iterator[bytes]:
    """Decompress gzip members one after the other, a bounded chunk at a time."""
    member = zlib.decompressobj(wbits=31)
    pending, read_bytes, written_bytes = head, len(head), 0
    while True:
        try:
            chunk = member.decompress(pending, _CHUNK_BYTES)
        except zlib.error as error:
            raise BadRowError("E_CORRUPT_GZIP", f"damaged gzip data: {error}") from None
        written_bytes += len(chunk)
        ratio = written_bytes / read_bytes
        if written_bytes > limits.gzip_ratio_from_bytes and ratio > limits.max_gzip_ratio:
            raise BadRowError("E_GZIP_BOMB", f"{read_bytes} bytes decompress to over {written_bytes}")
        if chunk:
            yield chunk
        pending = member.unconsumed_tail
        if member.eof:
            pending = member.unused_data.lstrip(b"\0")
            while not pending and (more := stream.read(_CHUNK_BYTES)):
                read_bytes += len(more)
                pending = more.lstrip(b"\0")
            if not pending:
                return
            member = zlib.decompressobj(wbits=31)
        elif not pending and len(chunk) < _CHUNK_BYTES:
            pending = stream.read(_CHUNK_BYTES)
            read_bytes += len(pending)
            if not pending:
                raise BadRowError("E_TRUNCATED_GZIP", "the gzip file is cut off")
