"""Files are found in one order, and what is not there is named."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from pipeline_lib.data.place import LocalPlaces, RoutedPlaces, expand, fingerprint, shown_place
from pipeline_lib.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt", "sub/c.jsonl", ".hidden/d.jsonl", "odd"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(folder: Path, *places: str) -> list[str]:
    found = expand(LocalPlaces(), [str(folder / place) for place in places], suffixes=SUFFIXES)
    return [str(Path(file).relative_to(folder)) for file in found]


def test_expand(folder: Path) -> None:
    assert names(folder, ".") == ["a.jsonl.gz", "b.jsonl", "sub/c.jsonl"]
    assert names(folder, "*.jsonl") == ["b.jsonl"]
    assert names(folder, "**/*.jsonl") == [".hidden/d.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert names(folder, "odd") == ["odd"]
    assert names(folder, "sub/c.jsonl", ".") == ["sub/c.jsonl", "a.jsonl.gz", "b.jsonl"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("b.json", "does not exist; did you mean 'b.jsonl'?"),
        ("no/such", "neither does the folder"),
        ("*.parquet", "no file that ends with"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, place: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        names(folder, place)
    assert message in caught.value.cause
    assert caught.value.next_step


def test_relative_globs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert LocalPlaces().list("*.jsonl") == ["b.jsonl"]


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        LocalPlaces().list(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(DataError, match="not a regular file"):
        LocalPlaces().open(str(tmp_path / "pipe.jsonl"))


def test_schemes_are_routed(tmp_path: Path) -> None:
    class Elsewhere:
        def list(self, place: str) -> list[str]:
            return [place]

        def open(self, place: str) -> io.BytesIO:
            return io.BytesIO(place.encode())

    places = RoutedPlaces({"s3": Elsewhere()})
    assert places.list("s3://bucket/key") == ["s3://bucket/key"]
    assert places.open("s3://bucket/key").read() == b"s3://bucket/key"
    (tmp_path / "f").write_bytes(b"local")
    assert places.open(str(tmp_path / "f")).read() == b"local"
    with pytest.raises(DataError, match=r"cannot read ftp:// places"):
        places.list("ftp://host/file")


def test_fingerprint_is_the_sha256(folder: Path) -> None:
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # sha256sum of "x"
    assert fingerprint(LocalPlaces(), str(folder / "odd")) == digest


def test_names_that_are_no_utf8_can_be_shown() -> None:
    assert shown_place(os.fsdecode(b"caf\xe9.jsonl")) == r"caf\udce9.jsonl"
