"""Rows of Parquet files, on any place the opener knows."""

from __future__ import annotations

from typing import BinaryIO

from pipeline_lib.data.mapping import Note
from pipeline_lib.data.place import OpenPlace
from pipeline_lib.data.read import ReadLimits
from pipeline_lib.data.read_parquet import read_parquet
from pipeline_lib.data.source import FileFields, Items, RawItems, file_fingerprints, file_rows
from pipeline_lib.schema import Origin

_SUFFIXES = (".parquet",)


class Parquet(FileFields):
    """Read the rows of Parquet files; a row's number stands for its line."""

    def rows(self, opener: OpenPlace, note: Note) -> Items:
        """Yield every row, file after file."""
        return file_rows(self, opener, note, label=self.label or "parquet", suffixes=_SUFFIXES, reader=_read)

    def fingerprint(self, opener: OpenPlace) -> dict[str, str]:
        """Return the sha256 of each file."""
        return file_fingerprints(self.paths, opener, suffixes=_SUFFIXES)


def _read(stream: BinaryIO, origin: Origin, limits: ReadLimits) -> RawItems:
    return read_parquet(stream, origin=origin, limits=limits)
