"""Where rows lie: local files, folders and globs; other schemes through an opener the stage passes in.

The code that reads rows knows only `OpenPlace`. The storage layer supplies the one for `s3://`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline_lib.errors import DataError
from pipeline_lib.validation import did_you_mean

_CHUNK_BYTES = 1 << 20
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://")
_GLOB = re.compile(r"[*?\[]")

Places = list[str]


class OpenPlace(Protocol):
    """How files are found and opened, whatever they lie on."""

    def list(self, place: str) -> Places:
        """Return the files that a path, folder, glob or prefix stands for, sorted.

        Raises:
            DataError: There is nothing at this place.
        """

    def open(self, place: str) -> BinaryIO:
        """Open one file for reading bytes. The caller closes it.

        Raises:
            DataError: It cannot be opened.
        """


class LocalPlaces:
    """Files of this machine."""

    def list(self, place: str) -> Places:
        """Return the file itself, the files under a folder, or those a glob matches, sorted."""
        path = Path(place).expanduser()
        if path.is_file():
            return [str(path)]
        if path.is_dir():
            return sorted(str(file) for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        if path.exists():
            raise DataError(f"{place} is not a regular file", next_step="give a file, a folder or a glob")
        if _GLOB.search(place):
            root = Path(path.anchor) if path.anchor else Path()
            pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
            return sorted(str(file) for file in root.glob(pattern) if file.is_file())
        raise DataError(f"{place} does not exist{_nearest(path)}", next_step="correct the path")

    def open(self, place: str) -> BinaryIO:
        """Open a regular file; a device or a pipe could hang the reader and is refused."""
        path = Path(place).expanduser()
        try:
            if not path.is_file():
                raise DataError(f"{place} is not a regular file", next_step="give a file, a folder or a glob")
            return path.open("rb")
        except OSError as error:
            raise DataError(
                f"{place} cannot be read: {error.strerror or error}",
                next_step="correct the path or its permissions",
            ) from error


class RoutedPlaces:
    """Sends each place to the opener of its scheme; a place with none is a local path."""

    def __init__(self, by_scheme: Mapping[str, OpenPlace]) -> None:
        """Take `{"s3": opener}`; local files need no entry."""
        self._by_scheme = dict(by_scheme)
        self._local = LocalPlaces()

    def list(self, place: str) -> Places:
        """Return the files that a place stands for, sorted."""
        return self._opener(place).list(place)

    def open(self, place: str) -> BinaryIO:
        """Open one file for reading bytes."""
        return self._opener(place).open(place)

    def _opener(self, place: str) -> OpenPlace:
        match = _SCHEME.match(place)
        if match is None:
            return self._local
        if match.group(1) not in self._by_scheme:
            known = ", ".join(f"{scheme}://" for scheme in sorted(self._by_scheme)) or "none"
            raise DataError(
                f"{place}: cannot read {match.group(1)}:// places",
                next_step=f"use a local path or one of: {known}",
            )
        return self._by_scheme[match.group(1)]


def expand(opener: OpenPlace, places: Iterable[str], *, suffixes: tuple[str, ...]) -> Places:
    """Return the files that configured places stand for, each once, in the given order.

    A place that names one file is taken whatever it is called; under a folder, prefix or glob only
    files with one of the suffixes count.

    Raises:
        DataError: A place does not exist or holds no such file.
    """
    found: dict[str, None] = {}
    for place in places:
        files = opener.list(place)
        if len(files) != 1 or files[0] != str(_local(place)):
            files = [file for file in files if file.lower().endswith(suffixes)]
        if not files:
            raise DataError(
                f"{place}: no file that ends with {' or '.join(suffixes)}",
                next_step="correct the path, or name the files one by one",
            )
        found.update(dict.fromkeys(files))
    return list(found)


def fingerprint(opener: OpenPlace, place: str) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with opener.open(place) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def shown_place(place: str) -> str:
    """Return a file's name as text that can be written: bytes that are no UTF-8 are escaped."""
    return place.encode("utf-8", "backslashreplace").decode("utf-8")


def _local(place: str) -> str | Path:
    return place if _SCHEME.match(place) else Path(place).expanduser()


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; neither does the folder {path.parent}"
    return did_you_mean(path.name, [sibling.name for sibling in path.parent.iterdir()])
