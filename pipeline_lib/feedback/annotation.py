"""Files that people label: one row a prompt with its responses, in the layout `ranked` that `collect` reads too.

The file is written once and never again: what people wrote into it is theirs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline_lib.data.fields import find
from pipeline_lib.data.layouts import map_ranked
from pipeline_lib.data.read import RawRow, read_jsonl
from pipeline_lib.data.refusal import BadRowError
from pipeline_lib.errors import DataError
from pipeline_lib.hashing import canonical_json, sha256_json
from pipeline_lib.schema import Message, Origin, Rejection

SHOWN_PROBLEMS = 5
"""Rows that a message names, each with its reason."""
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class LabelItem:
    """What a person ranks: a prompt and two or more responses, in an order that says nothing."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in files: the sha256 of its texts."""
        return sha256_json([[[turn.role, turn.content] for turn in self.prompt], list(self.responses)])

    @property
    def shown(self) -> list[str]:
        """The responses as they are written: a NUL, which a model may well say, is in no file for people."""
        return [text.replace("\0", _REPLACEMENT) for text in self.responses]

    def row(self) -> dict[str, Any]:
        """Return the row that waits for `ranks`."""
        prompt = [{"role": turn.role, "content": turn.content.replace("\0", _REPLACEMENT)} for turn in self.prompt]
        return {"key": self.key, "prompt": prompt, "responses": self.shown, "ranks": None}


@dataclass
class PeoplesLabels:
    """What a file says."""

    ranks: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    """By key: the place of each response, 1 the best, equal numbers ties; None where the row is to be left out."""
    waiting: list[str] = field(default_factory=list)
    """Rows without labels, as `file:line`, and keys that the file does not have."""


def write_items(path: Path, items: Sequence[LabelItem]) -> None:
    """Write the file to label; it appears whole, and only where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(b"".join(canonical_json(item.row()) + b"\n" for item in items))
    try:
        os.link(draft, path)  # unlike a rename it never replaces a file that somebody has begun to label
    except FileExistsError:
        return
    finally:
        draft.unlink()


def read_labels(path: Path, items: Sequence[LabelItem], *, is_partial: bool = False) -> PeoplesLabels:
    """Read what people wrote into a file.

    A row holds `ranks` (1 the best, equal numbers are ties) or `scores` (higher is better), or `skip: true`
    where none of the responses is worth a label.

    Args:
        path: The file.
        items: What it is about.
        is_partial: The file may be about other responses too, and not about all of these.

    Raises:
        DataError: Rows cannot be read, are about other responses, or contradict each other or themselves;
            they are named by file and line.
    """
    by_key = {item.key: item for item in items}
    found, lines, problems = PeoplesLabels(), dict[str, int | None](), list[str]()
    waiting: dict[str, str] = {}
    for line, row in _rows(path):
        place = f"{path}:{line}"
        if isinstance(row, str):
            problems.append(f"{place}: {row}")
            continue
        item = by_key.get(str(row.get("key")))
        if item is None:
            if not is_partial:
                problems.append(f"{place}: its key is none of the sampled responses'")
            continue
        try:
            ranks = _ranks(row, item)
        except BadRowError as error:
            problems.append(f"{place}: {error.code}: {error.reason}")
            continue
        if ranks is _WAITS:
            waiting.setdefault(item.key, place)
        elif item.key in found.ranks and found.ranks[item.key] != ranks:
            problems.append(f"{place}: contradicts line {lines[item.key]}: {_shown(ranks)}")
        else:
            found.ranks[item.key], lines[item.key] = ranks, line
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise DataError(
            "; ".join(problems[:SHOWN_PROBLEMS]) + more,
            next_step="correct the lines named; `ranks`, `scores` and `skip` are yours, the texts stay as they are",
        )
    if not is_partial:
        left = (key for key in by_key if key not in found.ranks)
        found.waiting += [waiting.get(key, f"{path}: no row of key {key[:12]}") for key in left]
    return found


_WAITS: tuple[int, ...] = (0,)
"""Stands for a row that nobody has labelled; ranks begin with 1."""


def _rows(path: Path) -> Iterator[tuple[int | None, dict[str, Any] | str]]:
    """Yield each row with its line, and the reason where it cannot be read."""
    with path.open("rb") as stream:
        for row in read_jsonl(stream, origin=Origin(source="labels", place=str(path))):
            if isinstance(row, Rejection):
                yield row.origin.line, f"{row.code}: {row.reason}"
            else:
                assert isinstance(row, RawRow)
                yield row.line, row.values


def _ranks(row: dict[str, Any], item: LabelItem) -> tuple[int, ...] | None:
    """Return a row's ranks, `_WAITS` where it has none, None where it is to be left out."""
    skip = row.get("skip", False)
    if not isinstance(skip, bool):
        raise BadRowError("E_TYPE", "skip is neither true nor false")
    if skip:
        return None
    given = {name: row[name] for name in map(partial(find, row), ("ranks", "scores")) if name is not None}
    if all(value is None for value in given.values()):
        return _WAITS
    if row.get("responses", item.shown) != item.shown:
        raise BadRowError("E_RANKS", "the responses are not those that were sampled, in their order")
    # The key names the texts; what a model wrote need not be what the reader takes for a good text.
    return map_ranked({**given, "prompt": "sampled", "responses": [str(k) for k in range(len(item.responses))]}).ranks


def _shown(ranks: tuple[int, ...] | None) -> str:
    return "skip" if ranks is None else f"ranks {list(ranks)}"
