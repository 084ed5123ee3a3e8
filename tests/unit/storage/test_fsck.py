"""The check of the store: every seeded fault is found, a repair lets the next run put it right."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_lib.hashing import sha256_bytes
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.fsck import check, gc
from pipeline_lib.storage.pointer import Pointer
from pipeline_lib.storage.store import ArtifactStore, blob_path

pytestmark = pytest.mark.servers

KEY = "ab" * 32
ROWS, WEIGHTS = b'{"row": 1}', b"the weights"


class Line:
    """Two stages' artifacts, a champion and a checkpoint in one store."""

    def __init__(self, store: ArtifactStore, directory: Path) -> None:
        self.store, self.directory = store, directory
        self.rows = self.commit("rows", "rows.jsonl", ROWS, inputs={}, key="cd" * 32)
        self.model = self.commit("model", "weights.bin", WEIGHTS, inputs={"rows": self.rows}, key=KEY)
        self.pointer = Pointer(store, "champion-x")
        self.pointer.swap(None, {"model": self.model.model_dump(), "previous": None})
        Checkpoints(store, "ef" * 32).save(3, self.folder("checkpoint", "state.json", b"{}"), {})

    def folder(self, name: str, file: str, content: bytes) -> Path:
        folder = self.directory / name
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
        return folder

    def commit(self, kind: str, file: str, content: bytes, *, inputs: dict[str, ArtifactRef], key: str) -> ArtifactRef:
        return self.store.commit(
            self.folder(kind, file, content), kind=kind, stage=f"make_{kind}", stage_version=1, config={},
            inputs=inputs, metrics={}, measurements={}, stage_key=key,
        )  # fmt: skip

    def put_blob(self, content: bytes, instead: bytes) -> None:
        self.store.objects.put(blob_path(sha256_bytes(content)), instead)


@pytest.fixture
def line(store: ArtifactStore, tmp_path: Path) -> Line:
    return Line(store, tmp_path)


def test_a_sound_store(line: Line) -> None:
    report = check(line.store)
    assert report.findings == ()
    assert (report.num_artifacts, report.num_blobs, report.num_names, report.num_checkpoints) == (2, 2, 3, 1)
    assert report.num_bytes == len(ROWS) + len(WEIGHTS)
    assert report.in_words() == (
        "2 artifacts, 2 files (21 bytes, read and hashed), 3 names, 1 checkpoints: "
        "0 error, 0 warning, 0 repaired, 0 reclaimable"
    )


def test_a_flipped_byte(line: Line) -> None:
    line.put_blob(WEIGHTS, b"the weighty")
    report = check(line.store)
    assert sorted((finding.severity, finding.subject) for finding in report.findings) == [
        ("error", f"artifact {line.model}"), ("error", "pointer champion-x"), ("error", f"stage {KEY[:12]}"),
    ]  # fmt: skip
    assert "weights.bin has other content than its sha256 says" in report.in_words()
    assert check(line.store, deep=False).num_errors == 0  # sizes are equal


@pytest.mark.parametrize("deep", [True, False])
def test_missing_and_short_files(line: Line, deep: bool) -> None:
    line.put_blob(ROWS, b"x")
    line.store.objects.delete(blob_path(sha256_bytes(WEIGHTS)))
    words = check(line.store, deep=deep).in_words()
    assert f"artifact {line.rows}: rows.jsonl has 1 bytes instead of 10" in words
    assert f"artifact {line.model}: weights.bin is missing" in words


def test_a_repair_takes_the_good_copy_of_the_cache(line: Line) -> None:
    line.store.open_bytes(line.model, "weights.bin")
    line.put_blob(WEIGHTS, b"the weighty")
    report = check(line.store, repair=True)
    assert [finding.severity for finding in report.findings] == ["repaired"]
    assert "restored from the local cache" in report.in_words()
    assert check(line.store).findings == ()


def test_after_a_repair_without_a_copy_the_stage_runs_again(line: Line) -> None:
    line.put_blob(ROWS, b'{"row": 2}')
    report = check(line.store, repair=True)
    assert {finding.severity for finding in report.findings} == {"repaired", "warning"}
    assert line.store.find("cd" * 32) is None
    assert line.store.objects.head(blob_path(sha256_bytes(ROWS))) is None
    assert line.store.find(KEY) == line.model  # made from the rows, but whole itself
    again = check(line.store)
    assert (again.num_errors, len(again.findings)) == (0, 1)
    assert line.commit("rows", "rows.jsonl", ROWS, inputs={}, key="cd" * 32) == line.rows
    assert check(line.store).findings == ()


@pytest.mark.parametrize("content", [b"{", b'{"kind": "model"}', None])
def test_a_damaged_manifest(line: Line, content: bytes | None) -> None:
    path = f"artifacts/{line.rows.id}/manifest.json"
    if content is None:
        line.store.objects.delete(path)
    else:
        line.store.objects.put(path, content)
    words = check(line.store).in_words()
    assert f"stage {'cd' * 6}: its result {line.rows} has no readable manifest" in words
    assert f"artifact {line.model}: its input 'rows', {line.rows}, has no readable manifest" in words
    check(line.store, repair=True)
    assert line.commit("rows", "rows.jsonl", ROWS, inputs={}, key="cd" * 32) == line.rows
    assert check(line.store).findings == ()


def test_an_altered_manifest(line: Line) -> None:
    path = f"artifacts/{line.rows.id}/manifest.json"
    found = line.store.objects.get(path)
    assert found is not None
    line.store.objects.put(path, found.content.replace(b"make_rows", b"made_rows"))
    assert f"artifact {line.rows.id[:12]}: its manifest is not what its id names" in check(line.store).in_words()


def test_names_that_lead_nowhere(line: Line) -> None:
    line.store.objects.put(f"stages/{'12' * 32}.json", b'{"kind": "model", "id": "%s"}' % (b"0" * 64))
    line.store.objects.put(f"stages/{'34' * 32}.json", b"?")
    line.store.objects.put("pointers/broken.json", b"?")
    words = check(line.store).in_words()
    assert "stage 121212121212: its result model/000000000000 has no readable manifest" in words
    assert "stage 343434343434: its result None is not readable" in words
    assert "pointer broken: is no JSON" in words


def test_damaged_checkpoints_are_warnings(line: Line) -> None:
    start = f"checkpoints/{'ef' * 32}/00000003"
    path = f"{start}/{sha256_bytes(b'{}')}"
    line.store.objects.put(path, b"[]")
    line.store.objects.put(f"checkpoints/{'ef' * 32}/00000002.json", b"")
    report = check(line.store)
    assert [(finding.severity, finding.problem) for finding in report.findings] == [
        ("warning", "its manifest is not readable"), ("warning", "state.json has other content than its sha256 says"),
    ]  # fmt: skip
    line.store.objects.delete(path)
    assert "state.json is missing" in check(line.store, deep=False).in_words()
    assert [finding.severity for finding in check(line.store, repair=True).findings] == ["repaired"] * 2
    assert check(line.store).findings == ()
    assert Checkpoints(line.store, "ef" * 32).latest() is None


def test_left_overs_are_counted_and_taken_once_they_are_old(line: Line) -> None:
    store = line.store
    orphan = b"of a run that was killed"
    line.put_blob(orphan, orphan)
    Checkpoints(store, KEY).save(1, line.folder("checkpoint", "state.json", b"{}"), {})
    store.client.create_multipart_upload(Bucket=store.settings.bucket, Key=store.settings.key("blobs/half"))
    report = check(store)
    assert report.num_errors == 0
    assert [finding.severity for finding in report.findings] == ["reclaimable"] * 2

    young = gc(store, dry_run=False)
    assert (young.num_blobs, young.num_uploads, young.num_checkpoint_files) == (0, 0, 0)
    planned = gc(store, dry_run=True, min_age_s=0)
    assert (planned.num_blobs, planned.num_bytes) == (1, len(orphan) + 2 + _size(store, KEY, 1))
    assert (planned.num_uploads, planned.num_checkpoint_files) == (1, 2)
    assert check(store).findings == report.findings  # nothing was done yet
    gc(store, dry_run=False, min_age_s=0)
    assert check(store).findings == ()
    assert store.find(KEY) == line.model
    assert Checkpoints(store, "ef" * 32).latest() == (3, {})  # its stage has no result yet


def _size(store: ArtifactStore, key: str, step: int) -> int:
    head = store.objects.head(f"checkpoints/{key}/{step:08d}.json")
    assert head is not None
    return head.size_bytes
