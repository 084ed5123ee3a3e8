"""Artifacts on a real S3 server: committed as a whole or not at all, checked whenever they are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import ConflictError, HeldError, IntegrityError, ModelNotFoundError
from pipeline_lib.hashing import canonical_json, sha256_bytes
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.fsck import MIN_AGE_S
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import TRUSTED_AGE_S, ArtifactStore, FileEntry, Manifest, blob_path

pytestmark = pytest.mark.servers

FILES = {"config.json": b'{"a": 1}', "model/weights.bin": bytes(range(256)) * 50, "empty.txt": b""}


def folder(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    directory.mkdir(exist_ok=True)
    return directory


def commit(store: ArtifactStore, directory: Path, **changed: Any) -> ArtifactRef:
    arguments: dict[str, Any] = {
        "kind": "model", "stage": "sft", "stage_version": 1, "config": {"lr": 0.5}, "inputs": {}, "metrics": {},
        "measurements": {}, "stage_key": None,
    }  # fmt: skip
    return store.commit(directory, **{**arguments, **changed})


def count_requests(store: ArtifactStore) -> Counter[str]:
    """Count the store's requests by operation from now on."""
    counts: Counter[str] = Counter()

    def count(model: Any, **_: Any) -> None:
        counts[model.name] += 1

    store.client.meta.events.register("before-call.s3", count)
    return counts


class Lost:
    """A lease that is lost after some checks."""

    def __init__(self, *, after: int) -> None:
        self.left = after

    def assert_held(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise HeldError("taken over", next_step="none")


def test_what_was_committed_comes_back(store: ArtifactStore, tmp_path: Path) -> None:
    base = commit(store, folder(tmp_path / "base", {"x": b"1"}))
    ref = commit(
        store, folder(tmp_path / "in", FILES), inputs={"base_model": base}, stage_key="ab" * 32,
        metrics={"accuracy_frac": 0.75, "lost": float("nan")}, measurements={"wall_s": 1.5},
    )  # fmt: skip
    assert store.find("ab" * 32) == ref
    manifest = store.manifest(ref)
    assert manifest.inputs == {"base_model": base}
    assert manifest.metrics == {"accuracy_frac": 0.75, "lost": None}
    assert manifest.files["config.json"] == FileEntry(sha256=sha256_bytes(b'{"a": 1}'), size_bytes=8)
    fetched = store.fetch(ref, tmp_path / "out")
    assert {p.relative_to(fetched).as_posix(): p.read_bytes() for p in fetched.rglob("*") if p.is_file()} == FILES
    assert store.read_json(ref, "config.json") == {"a": 1}
    assert set(store.list_artifacts()) == {base, ref}
    assert store.find("cd" * 32) is None


@pytest.mark.parametrize("is_cached", [True, False])
def test_lines(settings: S3Settings, tmp_path: Path, is_cached: bool) -> None:
    store = ArtifactStore(settings, cache_directory=tmp_path / "cache" if is_cached else None)
    ref = commit(store, folder(tmp_path / "in", {"rows.jsonl": b'{"a":1}\n\n{"a":"\xe2\x80\xa8"}\n{"a":3}'}))
    assert list(store.read_lines(ref, "rows.jsonl")) == [b'{"a":1}', b'{"a":"\xe2\x80\xa8"}', b'{"a":3}']
    assert store.open_bytes(ref, "rows.jsonl")[:7] == b'{"a":1}'


def test_id_by_hand(store: ArtifactStore, tmp_path: Path) -> None:
    """The id is the sha256 of the content part in canonical JSON, written out here."""
    ref = commit(store, folder(tmp_path / "in", {"a.txt": b"abc"}), metrics={"x": 1.0}, measurements={"wall_s": 9.0})
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content = (
        f'{{"config":{{"lr":0.5}},"files":{{"a.txt":{{"sha256":"{abc}","size_bytes":3}}}},'
        '"inputs":{},"kind":"model","stage":"sft","stage_version":1}'
    )
    assert ref.id == sha256_bytes(content.encode())


def test_the_same_content_is_not_uploaded_twice(store: ArtifactStore, tmp_path: Path) -> None:
    directory = folder(tmp_path / "in", FILES)
    first = commit(store, directory, stage_key="ab" * 32)
    counts = count_requests(store)
    assert commit(store, directory, stage_key="ab" * 32, measurements={"wall_s": 2.0}) == first
    # The manifest and the stage's name are offered, and refused because they are there.
    assert counts["PutObject"] == 2
    assert counts["CreateMultipartUpload"] == 0
    assert counts["HeadObject"] == len(FILES)
    assert store.manifest(first).measurements == {}  # an artifact does not change


def test_equal_files_share_a_blob(store: ArtifactStore, tmp_path: Path) -> None:
    commit(store, folder(tmp_path / "in", {"a": b"same", "b/c": b"same", "d": b"other"}))
    assert len(list(store.objects.list("blobs/"))) == 2


def test_a_large_file_goes_in_parts(store: ArtifactStore, tmp_path: Path) -> None:
    content = bytes(range(251)) * 160_000  # 40 MB
    counts = count_requests(store)
    ref = commit(store, folder(tmp_path / "in", {"big": content}))
    assert counts["UploadPart"] == 2
    assert (store.fetch(ref, tmp_path / "out") / "big").read_bytes() == content
    assert list(store.objects.uploads()) == []


def test_a_damaged_blob_is_uploaded_anew_by_the_next_commit(store: ArtifactStore, tmp_path: Path) -> None:
    directory = folder(tmp_path / "in", FILES)
    ref = commit(store, directory)
    path = blob_path(store.manifest(ref).files["model/weights.bin"].sha256)
    store.objects.put(path, bytes(len(FILES["model/weights.bin"])))
    assert commit(store, directory) == ref
    assert (store.fetch(ref, tmp_path / "out") / "model/weights.bin").read_bytes() == FILES["model/weights.bin"]


@pytest.mark.parametrize(("trusted_age_s", "num_written"), [(3600.0, 0), (-1.0, len(FILES))])
def test_a_blob_that_gc_might_take_is_written_anew(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted_age_s: float, num_written: int
) -> None:
    """A blob is young again once a commit counts on it, so `gc` cannot take it from under the commit."""
    assert 2 * TRUSTED_AGE_S <= MIN_AGE_S
    directory = folder(tmp_path / "in", FILES)
    ref = commit(store, directory)
    monkeypatch.setattr("pipeline_lib.storage.store.TRUSTED_AGE_S", trusted_age_s)
    counts = count_requests(store)
    assert commit(store, directory) == ref
    assert counts["PutObject"] == num_written + 1  # and the manifest


def test_a_damaged_manifest_is_written_anew_by_the_next_commit(store: ArtifactStore, tmp_path: Path) -> None:
    directory = folder(tmp_path / "in", FILES)
    ref = commit(store, directory)
    store.objects.put(f"artifacts/{ref.id}/manifest.json", b"{}")
    with pytest.raises(IntegrityError, match=rf"manifest of artifact {ref}"):
        store.manifest(ref)
    assert commit(store, directory) == ref
    assert store.manifest(ref).kind == "model"


@pytest.mark.parametrize("name", ["config.json", "model/weights.bin"])
@pytest.mark.parametrize("is_cached", [True, False])
def test_one_flipped_byte_is_named(settings: S3Settings, tmp_path: Path, name: str, is_cached: bool) -> None:
    store = ArtifactStore(settings, cache_directory=tmp_path / "cache" if is_cached else None)
    ref = commit(store, folder(tmp_path / "in", FILES))
    flipped = bytearray(FILES[name])
    flipped[3] ^= 1
    store.objects.put(blob_path(sha256_bytes(FILES[name])), bytes(flipped))
    with pytest.raises(IntegrityError, match=rf"{name} of artifact {ref} is not what its manifest promises"):
        store.fetch(ref, tmp_path / "out")
    with pytest.raises(IntegrityError, match=f"{name} of artifact {ref}"):
        store.open_bytes(ref, name)
    assert not (tmp_path / "out" / name).exists()
    assert list(tmp_path.rglob(".download-*")) == []


def test_a_missing_or_short_blob_is_named(store: ArtifactStore, tmp_path: Path) -> None:
    ref = commit(store, folder(tmp_path / "in", FILES), stage_key="ab" * 32)
    path = blob_path(sha256_bytes(FILES["config.json"]))
    store.objects.put(path, b"short")
    with pytest.raises(IntegrityError, match=rf"config\.json of artifact {ref} is not what"):
        store.find("ab" * 32)
    store.objects.delete(path)
    with pytest.raises(IntegrityError, match=rf"config\.json of artifact {ref} is missing"):
        store.find("ab" * 32)
    with pytest.raises(IntegrityError, match=r"config\.json .* is missing"):
        store.fetch(ref, tmp_path / "out", paths=["config.json"])
    with pytest.raises(IntegrityError, match=r"no file 'other\.json'"):
        store.read_json(ref, "other.json")


def test_a_damaged_cache_is_not_believed(store: ArtifactStore, tmp_path: Path) -> None:
    ref = commit(store, folder(tmp_path / "in", {"a": b"abc"}))
    assert store.open_bytes(ref, "a") == b"abc"
    cached = store.cached_file(sha256_bytes(b"abc"))
    assert cached is not None
    cached.write_bytes(b"abd")
    assert store.cached_file(sha256_bytes(b"abc")) is None
    assert store.open_bytes(ref, "a") == b"abc"
    counts = count_requests(store)
    assert (store.fetch(ref, tmp_path / "out") / "a").read_bytes() == b"abc"
    assert counts["GetObject"] == 1  # the manifest; the file is a link into the cache
    assert (tmp_path / "out" / "a").samefile(cached)


@pytest.mark.parametrize("path", ["../out", "/etc/x", "a/../../b", "a//b", "", "./a", "a/."])
def test_no_path_leads_out_of_the_directory(store: ArtifactStore, tmp_path: Path, path: str) -> None:
    ref = commit(store, folder(tmp_path / "in", {"a": b"abc"}))
    forged = json.loads(canonical_json(store.manifest(ref).model_dump(mode="json")))
    forged["files"] = {path: forged["files"]["a"]}
    content = {key: forged[key] for key in ("kind", "files", "stage", "stage_version", "config", "inputs")}
    forged_ref = ArtifactRef(kind="model", id=sha256_bytes(canonical_json(content)))
    store.objects.put(f"artifacts/{forged_ref.id}/manifest.json", canonical_json(forged))
    with pytest.raises(IntegrityError, match="manifest of artifact"):
        store.fetch(forged_ref, tmp_path / "out")


def test_another_result_for_the_same_key_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    first = commit(store, folder(tmp_path / "one", {"a": b"1"}), stage_key="ab" * 32)
    with pytest.raises(ConflictError, match="not deterministic"):
        commit(store, folder(tmp_path / "two", {"a": b"2"}), stage_key="ab" * 32)
    assert store.find("ab" * 32) == first


def test_a_lost_lease_stops_a_commit(store: ArtifactStore, tmp_path: Path) -> None:
    directory = folder(tmp_path / "in", FILES)
    with pytest.raises(HeldError):
        commit(store, directory, stage_key="ab" * 32, lease=Lost(after=0))
    assert list(store.list_artifacts()) == []
    with pytest.raises(HeldError):
        commit(store, directory, stage_key="ab" * 32, lease=Lost(after=1))
    assert len(list(store.list_artifacts())) == 1
    assert store.find("ab" * 32) is None


def test_a_base_model_folder(store: ArtifactStore, tmp_path: Path) -> None:
    store.objects.put("models/tiny/config.json", b"{}")
    store.objects.put("models/tiny/sub/weights", b"w")
    store.objects.put("models/tiny2/config.json", b"{}")
    uri = f"s3://{store.settings.bucket}/{store.settings.key('models/tiny')}"
    for place in (uri, f"{uri}/"):
        found = store.download_prefix(place, tmp_path / "model")
        assert sorted(p.relative_to(found).as_posix() for p in found.rglob("*") if p.is_file()) == [
            "config.json", "sub/weights",
        ]  # fmt: skip
    with pytest.raises(ModelNotFoundError, match="nothing at"):
        store.download_prefix(f"{uri}-absent", tmp_path / "none")


def test_an_artifact_of_no_files(store: ArtifactStore, tmp_path: Path) -> None:
    ref = commit(store, folder(tmp_path / "in", {}))
    assert list(store.fetch(ref, tmp_path / "out").iterdir()) == []


def test_metrics_and_machine_are_not_in_the_id() -> None:
    manifest = Manifest(kind="k", files={}, stage="s", stage_version=1, config={}, inputs={})
    other = manifest.model_copy(update={"metrics": {"x": 1.0}, "host": {"platform": "other"}, "created_at": "now"})
    assert other.id == manifest.id
    assert manifest.model_copy(update={"stage_version": 2}).id != manifest.id
