"""From a row's fields to records: which layout a file has, and a layout's rows made into records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.data.labels import Mapped, labels_of
from pipeline_lib.data.layouts import LAYOUTS, detect, rename
from pipeline_lib.data.read import RawRow
from pipeline_lib.data.refusal import BadRowError, reject_raw
from pipeline_lib.schema import Author, Origin, Record, Rejection, Response
from pipeline_lib.validation import Frozen

_SAMPLE_ROWS = 8

LayoutName = Literal[
    "auto", "prompt_completion", "rated", "messages", "alpaca", "preference", "hh", "prompt", "ranked", "compared",
    "systems",
]  # fmt: skip
Note = Callable[[str], None]
"""Takes one line about what a source decided by itself."""


class FieldMapping(Frozen):
    """How the fields of a source's rows become prompts, responses and ranks."""

    layout: LayoutName = "auto"
    """What the rows look like; `auto` looks at the first good rows."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Names of the file's fields where they differ, e.g. `{prompt: question, response: answer}`."""
    demonstrate_chosen: bool = False
    """Make of each comparison a demonstration of its best response too."""
    author: Author = Author()
    """Who wrote the responses, where the rows do not say."""
    tags: tuple[str, ...] = ()
    """Tags of every row, besides those it carries itself, e.g. `[safe]`."""


def map_rows(
    rows: Iterable[RawRow | Rejection], mapping: FieldMapping, *, origin: Callable[[], Origin], note: Note
) -> Iterator[Record | Rejection]:
    """Make records of raw rows; rejections pass through.

    Args:
        rows: What the reader yields.
        mapping: Layout and field names.
        origin: Gives source, licence and place of the row that was read last.
        note: Told which layout was chosen.
    """
    layout: str | None = None if mapping.layout == "auto" else mapping.layout
    waiting: list[tuple[RawRow, Origin]] = []
    for row in rows:
        if isinstance(row, Rejection):
            yield row
        elif layout is not None:
            yield from _records(row, layout, mapping, origin())
        else:
            waiting.append((row, origin()))
            if len(waiting) == _SAMPLE_ROWS:
                layout = _choose(waiting, mapping, note)
                for raw, place in waiting:
                    yield from _records(raw, layout, mapping, place)
                waiting.clear()
    if waiting:
        layout = _choose(waiting, mapping, note)
        for raw, place in waiting:
            yield from _records(raw, layout, mapping, place)


def _choose(sample: list[tuple[RawRow, Origin]], mapping: FieldMapping, note: Note) -> str:
    """Return the layout most of the sample has; `unknown` where none of it has one."""
    votes = Counter(name for row, _ in sample if (name := detect(rename(row.values, mapping.fields))) is not None)
    layout, count = votes.most_common(1)[0] if votes else ("unknown", len(sample))
    note(f"layout {layout}: {count} of the first {len(sample)} rows of {sample[0][1].place}")
    return layout


def _records(row: RawRow, layout: str, mapping: FieldMapping, origin: Origin) -> Iterator[Record | Rejection]:
    values = rename(row.values, mapping.fields)
    try:
        if layout not in LAYOUTS:
            known = ", ".join(LAYOUTS)
            raise BadRowError("E_LAYOUT", f"none of the layouts {known} has the fields {', '.join(values)}"[:180])
        mapped = LAYOUTS[layout](values)
        yield from _checked(mapped, values, row, mapping, origin)
    except BadRowError as error:
        yield reject_raw(error, origin=origin, line=row.line, byte_offset=row.byte_offset, raw=str(row.values)[:800])


def _checked(
    mapped: Mapped, values: dict[str, Any], row: RawRow, mapping: FieldMapping, origin: Origin
) -> list[Record]:
    """Build all records of a row, so that it is accepted or refused as a whole."""
    group = values.get("group", "")
    if not isinstance(group, str | int):
        raise BadRowError("E_TYPE", "group is neither text nor a whole number")
    place = origin.model_copy(update={"line": row.line})
    group_name = f"{origin.source}:{group}" if group != "" else ""
    labels = labels_of(values, mapped)
    tags = tuple(dict.fromkeys((*mapping.tags, *labels.tags)))
    responses = _responses(mapped, mapping)
    records = [
        Record.create(
            mapped.prompt, responses, mapped.ranks, origin=place, group=group_name,
            strength=labels.strength, weight=labels.weight, tags=tags, desirable=mapped.desirable,
        )
    ]  # fmt: skip
    if mapping.demonstrate_chosen and len(responses) >= 2 and mapped.ranks.count(1) == 1:
        best = (responses[mapped.ranks.index(1)],)
        records.append(
            Record.create(mapped.prompt, best, origin=place, group=group_name, weight=labels.weight, tags=tags)
        )
    return records


def _responses(mapped: Mapped, mapping: FieldMapping) -> tuple[Response, ...]:
    num = len(mapped.responses)
    scores = mapped.scores or (None,) * num
    authors = mapped.authors or (mapping.author,) * num
    return tuple(
        Response(content=text, author=author, score=score)
        for text, author, score in zip(mapped.responses, authors, scores, strict=True)
    )
