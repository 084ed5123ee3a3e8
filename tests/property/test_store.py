"""Whatever is committed comes back as it was, and its name is its content."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.fsck import check
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

Files = dict[str, bytes]


def has_no_file_below_a_file(files: Files) -> bool:
    return not any(other.startswith(f"{name}/") for name in files for other in files)


parts = st.one_of(
    st.sampled_from(["a", "b", "model.safetensors", "-rf", "%2e%2e", "a b", "ä", "a\u0308", "..."]),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12),
).filter(lambda part: part not in (".", ".."))
names = st.lists(parts, min_size=1, max_size=3).map("/".join)
contents = st.one_of(st.sampled_from([b"", b"\0", b"a", b"a\r\n", b"\xff" * 70]), st.binary(max_size=200))
all_files = st.dictionaries(names, contents, max_size=4).filter(has_no_file_below_a_file)


def commit(store: ArtifactStore, files: Files) -> ArtifactRef:
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return store.commit(
            Path(directory), kind="rows", stage="s", stage_version=1, config={}, inputs={}, metrics={},
            measurements={}, stage_key=None,
        )  # fmt: skip


def fetched(store: ArtifactStore, ref: ArtifactRef) -> Files:
    with tempfile.TemporaryDirectory() as directory:
        store.fetch(ref, Path(directory))
        found = (path for path in Path(directory).rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=all_files, second=all_files)
def test_what_goes_in_comes_out_and_equal_content_is_equal_id(
    store: ArtifactStore, first: Files, second: Files
) -> None:
    refs = [commit(store, files) for files in (first, second, first)]
    assert fetched(store, refs[0]) == first
    assert fetched(store, refs[1]) == second
    assert refs[2] == refs[0]
    assert (refs[0] == refs[1]) == (first == second)


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=all_files.filter(bool), data=st.data())
def test_moving_a_file_or_one_bit_gives_another_id(store: ArtifactStore, files: Files, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    bit = data.draw(st.integers(0, 8 * len(content) - 1)) if content else 0
    flipped = bytearray(content or b"\0")
    flipped[bit // 8] ^= 1 << (bit % 8)
    moved = {f"{name}.moved" if each == name else each: kept for each, kept in files.items()}
    ids = [commit(store, files).id, commit(store, {**files, name: bytes(flipped)}).id, commit(store, moved).id]
    assert len(set(ids)) == 3
    assert check(store).findings == ()
