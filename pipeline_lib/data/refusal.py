"""How a row is refused: a code and a reason while it is judged, a `Rejection` when it is written."""

from __future__ import annotations

from typing import NamedTuple

from pipeline_lib.schema import Origin, Record, Rejection

_EXCERPT_CHARACTERS = 200


class Refusal(NamedTuple):
    """Why a rule does not take a record."""

    code: str
    reason: str


class BadRowError(Exception):
    """A raw row that cannot become a record. Caught by the reader, never seen by a user."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


def excerpt(raw: bytes | str) -> str:
    """Return the start of a raw row, at most 200 characters, harmless in a terminal."""
    text = raw[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    shown = [_visible(char) for char in text[: _EXCERPT_CHARACTERS + 1]]
    joined = "".join(shown)
    return joined if len(joined) <= _EXCERPT_CHARACTERS else joined[: _EXCERPT_CHARACTERS - 1] + "…"


def _visible(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


def reject_raw(
    error: BadRowError,
    *,
    origin: Origin,
    line: int | None,
    byte_offset: int | None = None,
    raw: bytes | str = "",
) -> Rejection:
    """Make the rejection of a raw row.

    Args:
        error: Code and reason.
        origin: Source and place of the file.
        line: Line or row number, from 1.
        byte_offset: Offset of the row's first byte in the decompressed file.
        raw: The row, or its start.
    """
    return Rejection(
        code=error.code,
        reason=excerpt(error.reason),
        stage="read",
        origin=origin.model_copy(update={"line": line}),
        byte_offset=byte_offset,
        excerpt=excerpt(raw),
    )


def reject_record(refusal: Refusal, record: Record, *, stage: str) -> Rejection:
    """Make the rejection of a record that was read well but refused by the rule `stage`."""
    return Rejection(
        code=refusal.code,
        reason=excerpt(refusal.reason),
        stage=stage,
        origin=record.origin,
        excerpt=excerpt(record.messages[-1].content),
        record=record,
    )
