"""The artifact store: immutable, content-addressed files in S3, committed manifest last.

Layout below the prefix: `blobs/<aa>/<sha256>` files by content, `artifacts/<id>/manifest.json`,
`stages/<stage key>.json` the result of a stage, `pointers/`, `leases/`, `checkpoints/`.
Blobs are written and read back first, then the manifest, then the stage pointer, so a reader never
sees half an artifact. Every read is checked against its sha256 before it is used.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from pipeline_lib.errors import ConflictError, IntegrityError, ModelNotFoundError
from pipeline_lib.hashing import canonical_json, sha256_bytes, sha256_file
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.manifest import FileEntry, Manifest, check_relative, entry_of, installed_versions
from pipeline_lib.storage.objects import Objects, appearing_file, damaged
from pipeline_lib.storage.s3 import S3Settings

__all__ = ["ArtifactStore", "FileEntry", "Held", "Manifest", "blob_path"]

TRUSTED_AGE_S = 12 * 3600.0
"""A blob older than this is uploaded anew by a commit, so that `gc`, which takes orphans older than
a day, cannot take it before the manifest names it."""

BlobPath = Callable[[str], str]
"""Where a file of a given sha256 is kept."""


def blob_path(sha256: str) -> str:
    """Return the path of a blob."""
    return f"blobs/{sha256[:2]}/{sha256}"


class Held(Protocol):
    """A lease that is checked before each visible step of a commit."""

    def assert_held(self) -> None:
        """Raise HeldError where the lease was lost."""


class ArtifactStore:
    """Commits and reads artifacts."""

    def __init__(self, settings: S3Settings, *, cache_directory: Path | None = None) -> None:
        """Open the store.

        Args:
            settings: Where it is.
            cache_directory: Folder in which verified blobs are kept for the next read.
        """
        self.settings, self.cache_directory = settings, cache_directory
        self.objects = Objects(settings)
        self.client = self.objects.client

    def uri(self, ref: ArtifactRef) -> str:
        """Return the place of an artifact's manifest."""
        return f"s3://{self.settings.bucket}/{self.settings.key(_manifest_path(ref.id))}"

    def check_conditional_writes(self) -> None:
        """Try, once a process, whether the server honours conditional writes.

        Raises:
            ConditionalWriteError: It answers 200 to a conditional write that must fail.
        """
        self.objects.check_conditional_writes()

    # Commit.

    def commit(
        self,
        directory: Path,
        *,
        kind: str,
        stage: str,
        stage_version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, ArtifactRef],
        metrics: Mapping[str, float | None],
        measurements: Mapping[str, float],
        stage_key: str | None,
        lease: Held | None = None,
    ) -> ArtifactRef:
        """Commit the files of a directory as an artifact; doing it again changes nothing.

        Args:
            directory: The files.
            kind: What they are, e.g. `model`.
            stage: The stage that made them.
            stage_version: Its version.
            config: Its configuration.
            inputs: Its input artifacts by role.
            metrics: Figures of the result; one that is not finite is stored as None.
            measurements: What differs from run to run.
            stage_key: The key under which the result is found again; None for none.
            lease: Checked right before the manifest and right before the stage pointer.

        Raises:
            ConflictError: The stage key already has another result: the stage is not deterministic.
            HeldError: The lease was lost; nothing of this commit is visible.
            IntegrityError: A file read back twice is not the file that was written.
        """
        manifest = Manifest(
            kind=kind, files=self.upload_files(directory), stage=stage, stage_version=stage_version,
            config=dict(config), inputs=dict(inputs), created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=installed_versions(), metrics={name: _finite(value) for name, value in metrics.items()},
            measurements=dict(measurements),
            host={"platform": platform.platform(), "python": platform.python_version()},
        )  # fmt: skip
        if lease is not None:
            lease.assert_held()
        self._put_manifest(manifest)
        if stage_key is not None:
            if lease is not None:
                lease.assert_held()
            self._put_result(stage_key, manifest.ref, stage=stage)
        return manifest.ref

    def upload_files(self, directory: Path, *, at: BlobPath = blob_path) -> dict[str, FileEntry]:
        """Upload every file of a directory that is not there yet; all are read back.

        Args:
            directory: The files.
            at: Where a file of a given sha256 is kept; the shared blobs by default.
        """
        entries: dict[str, FileEntry] = {}
        for file in sorted(each for each in directory.rglob("*") if each.is_file()):
            entry = FileEntry(sha256=sha256_file(file), size_bytes=file.stat().st_size)
            entries[file.relative_to(directory).as_posix()] = entry
            if not self._is_whole(at(entry.sha256), entry):
                self.objects.upload(file, at(entry.sha256), sha256=entry.sha256)
        return entries

    def _is_whole(self, path: str, entry: FileEntry) -> bool:
        """Tell whether a file is there already, recent enough to be safe from `gc`, and undamaged."""
        head = self.objects.head(path)
        if head is None or head.size_bytes != entry.size_bytes or head.age_s > TRUSTED_AGE_S:
            return False
        return self.objects.sha256_of(path) == entry.sha256

    def _put_manifest(self, manifest: Manifest) -> None:
        path, content = _manifest_path(manifest.id), canonical_json(manifest.model_dump(mode="json"))
        try:
            self.objects.put(path, content, if_none_match=True)
        except ConflictError:
            try:
                self.manifest(manifest.ref)
            except IntegrityError:
                self.objects.put(path, content)  # the one that was there is damaged, this one is right

    def _put_result(self, stage_key: str, ref: ArtifactRef, *, stage: str) -> None:
        try:
            self.objects.put(_stage_path(stage_key), canonical_json(ref.model_dump()), if_none_match=True)
        except ConflictError:
            earlier = self.result_of(stage_key)
            if earlier != ref:
                raise ConflictError(
                    f"stage {stage} gave {ref}, an earlier run with the same key gave {earlier}: "
                    "it is not deterministic",
                    next_step="the earlier result is kept; run again to go on with it",
                ) from None

    # Read.

    def result_of(self, stage_key: str) -> ArtifactRef | None:
        """Return the artifact that a stage key names, unchecked.

        Raises:
            IntegrityError: The name itself cannot be read.
        """
        found = self.objects.get(_stage_path(stage_key))
        if found is None:
            return None
        try:
            return ArtifactRef.model_validate_json(found.content)
        except ValidationError as error:
            raise damaged(_stage_path(stage_key), is_missing=False) from error

    def find(self, stage_key: str) -> ArtifactRef | None:
        """Return the result of a stage, where there is one and all its files are there.

        Raises:
            IntegrityError: The result is named, but a file of it is missing or has another size.
        """
        ref = self.result_of(stage_key)
        if ref is None:
            return None
        for name, entry in self.manifest(ref).files.items():
            head = self.objects.head(blob_path(entry.sha256))
            if head is None or head.size_bytes != entry.size_bytes:
                raise damaged(f"{name} of artifact {ref}", is_missing=head is None)
        return ref

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return an artifact's manifest, checked against its id.

        Raises:
            IntegrityError: It is not there, or not the one that the id names.
        """
        found = self.objects.get(_manifest_path(ref.id))
        if found is None:
            raise damaged(f"the manifest of artifact {ref}", is_missing=True)
        try:
            manifest = Manifest.model_validate_json(found.content)
        except ValidationError as error:
            raise damaged(f"the manifest of artifact {ref}", is_missing=False) from error
        if manifest.ref != ref:
            raise damaged(f"the manifest of artifact {ref}", is_missing=False)
        return manifest

    def list_artifacts(self) -> Iterator[ArtifactRef]:
        """Yield every committed artifact."""
        for listed in self.objects.list("artifacts/"):
            found = self.objects.get(listed.path)
            if found is not None:
                yield ArtifactRef(kind=json.loads(found.content)["kind"], id=listed.path.split("/")[1])

    def open_bytes(self, ref: ArtifactRef, path: str) -> bytes:
        """Return a file of an artifact, checked against its sha256."""
        entry, label = self._entry(ref, path), f"{path} of artifact {ref}"
        if self.cache_directory is not None:
            return self._cached(entry, label=label).read_bytes()
        found = self.objects.get(blob_path(entry.sha256))
        if found is None or sha256_bytes(found.content) != entry.sha256:
            raise damaged(label, is_missing=found is None)
        return found.content

    def read_json(self, ref: ArtifactRef, path: str) -> Any:
        """Return a JSON file of an artifact."""
        return json.loads(self.open_bytes(ref, path))

    def read_lines(self, ref: ArtifactRef, path: str) -> Iterator[bytes]:
        """Yield the lines of a file of an artifact that are not empty, without their ends."""
        if self.cache_directory is None:
            yield from (line for line in self.open_bytes(ref, path).split(b"\n") if line)
            return
        with self._cached(self._entry(ref, path), label=f"{path} of artifact {ref}").open("rb") as file:
            yield from (line for line in (raw.rstrip(b"\n") for raw in file) if line)

    def fetch(self, ref: ArtifactRef, directory: Path, *, paths: Sequence[str] | None = None) -> Path:
        """Write an artifact's verified files into a directory: links into the cache where there is one.

        Args:
            ref: The artifact.
            directory: Where to; it is made.
            paths: Only these files; all by default.

        Raises:
            IntegrityError: A file is missing or is not what the manifest promises.
            DiskFullError: The disk has no room for it.
        """
        files = self.manifest(ref).files
        for name in paths if paths is not None else files:
            entry, label = entry_of(files, ref, name), f"{name} of artifact {ref}"
            target = directory / name
            if self.cache_directory is None:
                self._download(entry, target, label=label)
            else:
                _link(self._cached(entry, label=label), target, label=label)
        directory.mkdir(parents=True, exist_ok=True)  # where there was no file at all
        return directory

    def cached_file(self, sha256: str) -> Path | None:
        """Return the cache's copy of a blob, where there is one and its sha256 is right."""
        if self.cache_directory is None:
            return None
        cached = self.cache_directory / sha256[:2] / sha256
        return cached if cached.is_file() and sha256_file(cached) == sha256 else None

    def download_prefix(self, uri: str, directory: Path) -> Path:
        """Download every object below an `s3://bucket/prefix` into a directory (a base model's folder).

        Raises:
            ModelNotFoundError: There is nothing.
            IntegrityError: A key would lead out of the directory.
        """
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        settings = self.settings.model_copy(update={"bucket": bucket, "prefix": prefix.strip("/")})
        source = Objects(settings)
        sizes = {each.path: each.size_bytes for each in source.list("") if not each.path.endswith("/")}
        if not sizes:
            raise ModelNotFoundError(f"there is nothing at {uri}", next_step="check model.source")
        for name, size_bytes in sizes.items():
            try:
                check_relative(name)
            except ValueError as error:
                raise IntegrityError(f"{uri}: {error}", next_step="rename the object") from error
            source.download(name, directory / name, sha256=None, size_bytes=size_bytes, label=f"{name} of {uri}")
        return directory

    def _entry(self, ref: ArtifactRef, path: str) -> FileEntry:
        return entry_of(self.manifest(ref).files, ref, path)

    def _cached(self, entry: FileEntry, *, label: str) -> Path:
        """Return a verified blob in the cache, downloaded where it is not there."""
        assert self.cache_directory is not None
        found = self.cached_file(entry.sha256)
        if found is None:
            found = self.cache_directory / entry.sha256[:2] / entry.sha256
            self._download(entry, found, label=label)
        return found

    def _download(self, entry: FileEntry, target: Path, *, label: str) -> None:
        self.objects.download(
            blob_path(entry.sha256), target, sha256=entry.sha256, size_bytes=entry.size_bytes, label=label
        )


def _link(source: Path, target: Path, *, label: str) -> None:
    """Put a file at a second place: a link, or a copy on another file system."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with (
            source.open("rb") as content,
            appearing_file(target, label=label, needed_bytes=source.stat().st_size) as file,
        ):
            shutil.copyfileobj(content, file)


def _manifest_path(artifact_id: str) -> str:
    return f"artifacts/{artifact_id}/manifest.json"


def _stage_path(stage_key: str) -> str:
    return f"stages/{stage_key}.json"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
