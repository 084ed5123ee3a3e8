"""Any set of files comes back as it was; equal content has equal ids, other content has others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

Files = dict[str, bytes]

_PARTS = st.text(st.sampled_from("abZ09._- é%+"), min_size=1, max_size=8).filter(
    lambda part: part not in (".", "..") and part == part.strip()
)
_CONTENTS = st.one_of(st.binary(max_size=200), st.sampled_from([b"", b"same", b"\r\n\x00\xff"]))
FILES = st.dictionaries(st.lists(_PARTS, min_size=1, max_size=3).map(tuple), _CONTENTS, max_size=4)
CONFIGS = st.dictionaries(
    st.text(max_size=5), st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5))
)


def as_files(tree: dict[tuple[str, ...], bytes]) -> Files:
    """Return files by path, leaving out those whose path another file takes as its folder."""
    folders = {path[:depth] for path in tree for depth in range(1, len(path))}
    return {"/".join(path): content for path, content in tree.items() if path not in folders}


@pytest.fixture(scope="module")
def shared_store(s3_server: S3Settings) -> ArtifactStore:
    """One store for all examples: they must not disturb each other."""
    return ArtifactStore(s3_server.model_copy(update={"prefix": "property"}))


def commit(store: ArtifactStore, files: Files, config: dict[str, Any]) -> ArtifactRef:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return store.commit(
            Path(directory), kind="k", stage="s", stage_version=1, config=config, inputs={}, metrics={},
            measurements={}, stage_key=None,
        )  # fmt: skip


def fetch(store: ArtifactStore, ref: ArtifactRef) -> Files:
    with tempfile.TemporaryDirectory() as directory:
        out = store.fetch(ref, Path(directory) / "out")
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=FILES, config=CONFIGS)
def test_round_trip(shared_store: ArtifactStore, tree: dict[tuple[str, ...], bytes], config: dict[str, Any]) -> None:
    files = as_files(tree)
    ref = commit(shared_store, files, config)
    assert fetch(shared_store, ref) == files
    assert shared_store.manifest(ref).config == config
    assert commit(shared_store, dict(reversed(files.items())), dict(reversed(config.items()))) == ref


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(one=FILES.map(as_files), other=FILES.map(as_files), config=CONFIGS)
def test_ids_differ_where_content_does(
    shared_store: ArtifactStore, one: Files, other: Files, config: dict[str, Any]
) -> None:
    first, second = commit(shared_store, one, config), commit(shared_store, other, config)
    assert (first == second) == (one == other)
    assert commit(shared_store, one, {**config, "a new key": 1}) != first
