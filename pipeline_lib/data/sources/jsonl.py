"""Rows of JSONL files, plain or gzip, on any place the opener knows."""

from __future__ import annotations

from typing import BinaryIO

from pipeline_lib.data.mapping import Note
from pipeline_lib.data.place import OpenPlace
from pipeline_lib.data.read import ReadLimits, read_jsonl
from pipeline_lib.data.source import FileFields, Items, RawItems, file_fingerprints, file_rows
from pipeline_lib.schema import Origin

_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")


class Jsonl(FileFields):
    """Read JSON objects, one a line."""

    def rows(self, opener: OpenPlace, note: Note) -> Items:
        """Yield every row, file after file."""
        return file_rows(self, opener, note, label=self.label or "jsonl", suffixes=_SUFFIXES, reader=_read)

    def fingerprint(self, opener: OpenPlace) -> dict[str, str]:
        """Return the sha256 of each file."""
        return file_fingerprints(self.paths, opener, suffixes=_SUFFIXES)


def _read(stream: BinaryIO, origin: Origin, limits: ReadLimits) -> RawItems:
    return read_jsonl(stream, origin=origin, limits=limits)
