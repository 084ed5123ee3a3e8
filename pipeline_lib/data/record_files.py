"""Records and rejections as lines of canonical JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline_lib.errors import IntegrityError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.schema import Record, Rejection


def row_line(row: Record | Rejection) -> bytes:
    """Return a row as one line; line separators of Unicode stay as they are, so split at line feeds alone."""
    return canonical_json(row.model_dump(mode="json")) + b"\n"


def read_records(path: Path) -> Iterator[Record]:
    """Read a records file.

    Raises:
        IntegrityError: A line is no record.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Record.model_validate_json(line)
            except ValidationError as error:
                raise IntegrityError(
                    f"{path}:{number}: no record: {error.errors()[0]['msg']}",
                    next_step="run the stage that wrote it again",
                ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value for people: sorted keys, two spaces."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
