"""What a source is, and the one way in which file sources turn files into records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import BinaryIO, Protocol

from pydantic import Field

from pipeline_lib.data.mapping import FieldMapping, Note, map_rows
from pipeline_lib.data.place import OpenPlace, expand, fingerprint, shown_place
from pipeline_lib.data.read import RawRow, ReadLimits
from pipeline_lib.schema import Origin, Record, Rejection

Items = Iterator[Record | Rejection]
RawItems = Iterator[RawRow | Rejection]


class Source(Protocol):
    """A source of rows: one frozen class, its fields its parameters."""

    @property
    def label(self) -> str:
        """Name of the source in reports and in each row's origin."""

    def rows(self, opener: OpenPlace, note: Note) -> Items:
        """Yield every row, accepted or rejected, always in the same order.

        Raises:
            DataError: There is nothing to read at all.
        """

    def fingerprint(self, opener: OpenPlace) -> dict[str, str]:
        """Return what the rows depend on beyond the parameters, e.g. `{file: sha256}`.

        Raises:
            DataError: It cannot be told.
        """


class FileFields(FieldMapping):
    """The parameters that every source of files has."""

    path: str | tuple[str, ...] = Field(min_length=1)
    """File, folder, glob or `s3://bucket/prefix`, or a list of them."""
    label: str = ""
    """Name of the source in reports; the kind's name where empty."""
    license: str = "unknown"
    """Licence of the rows, as an SPDX identifier where there is one."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows, good or bad."""
    limits: ReadLimits = ReadLimits()
    """What a file may demand of the reader."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The configured places as a list."""
        return (self.path,) if isinstance(self.path, str) else self.path


Reader = Callable[[BinaryIO, Origin, ReadLimits], RawItems]


def file_rows(
    source: FileFields,
    opener: OpenPlace,
    note: Note,
    *,
    label: str,
    suffixes: tuple[str, ...],
    reader: Reader,
) -> Items:
    """Read every file of a source, one after the other, and map its rows.

    Args:
        source: Places, mapping and limits.
        opener: How files are found and opened.
        note: Told what was decided.
        label: Name of the source for each row's origin.
        suffixes: Which files under a folder count.
        reader: Reads one open file.
    """
    files = expand(opener, source.paths, suffixes=suffixes)
    current = [Origin(source=label, license=source.license)]

    def raw_rows() -> RawItems:
        for file in files:
            current[0] = Origin(source=label, license=source.license, place=shown_place(file))
            with opener.open(file) as stream:
                yield from reader(stream, current[0], source.limits)

    yield from map_rows(islice(raw_rows(), source.max_rows), source, origin=lambda: current[0], note=note)


def file_fingerprints(paths: Sequence[str], opener: OpenPlace, *, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return `{file: sha256}` of every file that the places stand for."""
    return {shown_place(file): fingerprint(opener, file) for file in expand(opener, paths, suffixes=suffixes)}
