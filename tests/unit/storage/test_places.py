"""Input files on a real S3 server: found like local ones, read as a stream, named when missing."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from pipeline_lib.data.place import RoutedPlaces, fingerprint
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.data.sources.parquet import Parquet
from pipeline_lib.errors import BucketError, DataError
from pipeline_lib.hashing import sha256_bytes
from pipeline_lib.schema import Record
from pipeline_lib.storage.places import S3Places
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

ROWS = b"".join(json.dumps({"prompt": f"p{n}", "response": "r"}).encode() + b"\n" for n in range(5))
FILES = {"in/a.jsonl": ROWS, "in/sub/b.jsonl.gz": gzip.compress(ROWS), "in/notes.txt": b"x", "in2/c.jsonl": ROWS}


@pytest.fixture
def base(store: ArtifactStore) -> str:
    """Put the input files below the store's prefix; returns their common place."""
    for name, content in FILES.items():
        store.objects.put(f"input/{name}", content)
    return f"s3://{store.settings.bucket}/{store.settings.key('input')}"


def places(store: ArtifactStore) -> RoutedPlaces:
    return RoutedPlaces({"s3": S3Places(store.client, store.settings)})


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("in", ["in/a.jsonl", "in/notes.txt", "in/sub/b.jsonl.gz"]),
        ("in/", ["in/a.jsonl", "in/notes.txt", "in/sub/b.jsonl.gz"]),
        ("in/a.jsonl", ["in/a.jsonl"]),
        ("in/*.jsonl", ["in/a.jsonl"]),
        ("**/*.jsonl*", ["in/a.jsonl", "in/sub/b.jsonl.gz", "in2/c.jsonl"]),
        ("in?/*", ["in2/c.jsonl"]),
    ],
)
def test_list(store: ArtifactStore, base: str, place: str, expected: list[str]) -> None:
    assert places(store).list(f"{base}/{place}") == [f"{base}/{name}" for name in expected]


def test_rows_come_over_the_network(store: ArtifactStore, base: str) -> None:
    rows: list[Any] = list(Jsonl(path=f"{base}/in").rows(places(store), lambda _: None))
    assert [type(row) for row in rows] == [Record] * 10
    assert {row.origin.place for row in rows} == {f"{base}/in/a.jsonl", f"{base}/in/sub/b.jsonl.gz"}
    assert fingerprint(places(store), f"{base}/in/a.jsonl") == sha256_bytes(ROWS)


def test_parquet_without_seeking(store: ArtifactStore, base: str) -> None:
    pa, pq, io = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet", "io"))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["c", "d"]}), buffer)
    store.objects.put("input/rows.parquet", buffer.getvalue())
    rows = list(Parquet(path=f"{base}/rows.parquet").rows(places(store), lambda _: None))
    assert [type(row) for row in rows] == [Record] * 2


def test_what_is_not_there_is_named(store: ArtifactStore, base: str) -> None:
    with pytest.raises(DataError, match="nothing at"):
        places(store).list(f"{base}/nowhere")
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        places(store).open(f"{base}/missing.jsonl")
    with pytest.raises(BucketError, match="no-such-bucket"):
        places(store).list("s3://no-such-bucket/x")
    with pytest.raises(DataError, match="names no bucket"):
        places(store).list("s3:///x")
