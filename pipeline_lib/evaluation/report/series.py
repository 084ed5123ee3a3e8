"""Rows and figures out of an artifact's files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline_lib.schema import ArtifactRef

if TYPE_CHECKING:
    from pipeline_lib.storage.store import ArtifactStore

Series = dict[str, list[tuple[float, float]]]
"""(step, value) by the figure's name, finite values only."""


def rows_of(store: ArtifactStore, ref: ArtifactRef, path: str) -> Iterator[dict[str, Any]]:
    """Read the rows of a JSONL file of an artifact."""
    for line in store.read_lines(ref, path):
        yield json.loads(line)


def series_of(rows: Iterable[Mapping[str, Any]], along: str) -> Series:
    """Return every figure of some rows over one of them, e.g. `step`; what is not finite is left out."""
    series: Series = {}
    for row in rows:
        for figure, value in row.items():
            if figure != along and is_finite(value):
                series.setdefault(figure, []).append((float(row[along]), float(value)))
    return series


def is_finite(value: object) -> bool:
    """Return whether something read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
