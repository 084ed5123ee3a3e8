"""The artifact store: immutable, content-addressed files in S3, committed manifest last.

Layout below the prefix: `blobs/<aa>/<sha256>` files by content, `artifacts/<id>/manifest.json`,
`stages/<stage key>.json` the result of a stage, `pointers/`, `leases/`, `checkpoints/`.
Blobs are written and read back first, then the manifest, then the stage pointer, so a reader never
sees half an artifact. Every read is checked against its sha256 before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from botocore.exceptions import ClientError
from pydantic import Field

from pipeline_lib.errors import (
    ConditionalWriteError,
    ConflictError,
    DiskFullError,
    IntegrityError,
    ModelNotFoundError,
)
from pipeline_lib.hashing import canonical_json, sha256_bytes, sha256_file, sha256_json
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.s3 import (
    MISSING_CODES,
    S3Settings,
    error_code,
    named_errors,
    open_client,
)
from pipeline_lib.validation import Frozen

_PACKAGES = ("prefline", "torch", "transformers", "peft", "datasets", "mlflow", "prefect", "numpy")
_checked_endpoints: set[tuple[str | None, str]] = set()


def blob_path(sha256: str) -> str:
    """Return the path of a blob."""
    return f"blobs/{sha256[:2]}/{sha256}"


BlobPath = Callable[[str], str]


class Held(Protocol):
    """A lease that is checked before each visible step of a commit."""

    def assert_held(self) -> None:
        """Raise HeldError where the lease was lost."""


class FileEntry(Frozen):
    """One file of an artifact."""

    sha256: str
    size_bytes: int


class Manifest(Frozen):
    """What an artifact is and how it came to be. The id covers the fields up to `inputs`."""

    kind: str
    files: dict[str, FileEntry]
    """By relative POSIX path."""
    stage: str
    stage_version: int
    config: dict[str, Any]
    inputs: dict[str, ArtifactRef]
    created_at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    measurements: dict[str, float] = Field(default_factory=dict)
    """What differs from run to run: `wall_s`, `peak_rss_bytes`."""
    host: dict[str, str] = Field(default_factory=dict)

    @property
    def id(self) -> str:
        """Sha256 of the canonical content part."""
        content = self.model_dump(
            mode="json", include={"kind", "files", "stage", "stage_version", "config", "inputs"}
        )
        return sha256_json(content)

    @property
    def ref(self) -> ArtifactRef:
        """The artifact's reference."""
        return ArtifactRef(kind=self.kind, id=self.id)


class ArtifactStore:
    """Commits and reads artifacts."""

    def __init__(self, settings: S3Settings, *, cache_directory: Path | None = None) -> None:
        """Open the store.

        Args:
            settings: Where it is.
            cache_directory: Folder in which verified blobs are kept for the next read.
        """
        self.settings, self.cache_directory = settings, cache_directory
        self.client = open_client(settings)

    def uri(self, ref: ArtifactRef) -> str:
        """Return the place of an artifact's manifest."""
        return f"s3://{self.settings.bucket}/{self.settings.key(f'artifacts/{ref.id}/manifest.json')}"

    # Objects: the few calls that everything else is made of.

    def get(self, path: str) -> tuple[bytes, str] | None:
        """Return an object's bytes and ETag, or None where there is none."""
        with named_errors(self.settings, f"reading {path}"):
            try:
                answer = self.client.get_object(Bucket=self.settings.bucket, Key=self.settings.key(path))
                return answer["Body"].read(), answer["ETag"]
            except ClientError as error:
                if error_code(error) in MISSING_CODES:
                    return None
                raise

    def put(
        self, path: str, content: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> str:
        """Write an object, with a condition where one is given, and return its ETag.

        Raises:
            ConflictError: The condition does not hold.
        """
        condition: dict[str, Any] = {}
        if if_none_match:
            condition["IfNoneMatch"] = "*"
        if if_match is not None:
            condition["IfMatch"] = if_match
        with named_errors(self.settings, f"writing {path}"):
            answer = self.client.put_object(
                Bucket=self.settings.bucket, Key=self.settings.key(path), Body=content, **condition
            )
        return answer["ETag"]

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is no error."""
        with named_errors(self.settings, f"deleting {path}"):
            self.client.delete_object(Bucket=self.settings.bucket, Key=self.settings.key(path))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yield path and size of every object below a path."""
        start = len(self.settings.key(""))
        with named_errors(self.settings, f"listing {prefix}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.settings.bucket, Prefix=self.settings.key(prefix)
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    yield entry["Key"][start:], entry["Size"]

    def size_of(self, path: str) -> int | None:
        """Return an object's size, or None where there is none."""
        with named_errors(self.settings, f"looking at {path}"):
            try:
                answer = self.client.head_object(Bucket=self.settings.bucket, Key=self.settings.key(path))
                return answer["ContentLength"]
            except ClientError as error:
                if error_code(error) in MISSING_CODES:
                    return None
                raise

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

        Raises:
            ConflictError: The stage key already has another result: the stage is not deterministic.
            IntegrityError: A file read back twice is not the file that was written.
        """
        manifest = Manifest(
            kind=kind, files=self.upload_files(directory), stage=stage, stage_version=stage_version,
            config=dict(config), inputs=dict(inputs), created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(), metrics=dict(metrics), measurements=dict(measurements),
            host={"platform": platform.platform(), "python": platform.python_version()},
        )  # fmt: skip
        ref = manifest.ref
        if lease is not None:
            lease.assert_held()
        path = f"artifacts/{ref.id}/manifest.json"
        self._put_once(path, canonical_json(manifest.model_dump(mode="json")))
        if stage_key is not None:
            if lease is not None:
                lease.assert_held()
            self._put_once(f"stages/{stage_key}.json", canonical_json(ref.model_dump()))
            winner = self.find(stage_key)
            if winner is not None and winner != ref:
                raise ConflictError(
                    f"stage {stage} gave {ref}, an earlier run with the same key gave {winner}: it is not deterministic",
                    next_step="the earlier result is kept; run again to go on with it",
                )
        return ref

    def upload_files(self, directory: Path, *, at: BlobPath = blob_path) -> dict[str, FileEntry]:
        """Upload every file of a directory that is not there yet, and read each back.

        Args:
            directory: The files.
            at: Where a file of a given sha256 is kept; the shared blobs by default.
        """
        entries: dict[str, FileEntry] = {}
        for path in sorted(file for file in directory.rglob("*") if file.is_file()):
            entry = FileEntry(sha256=sha256_file(path), size_bytes=path.stat().st_size)
            entries[path.relative_to(directory).as_posix()] = entry
            if self.size_of(at(entry.sha256)) != entry.size_bytes:
                self._upload(path, at(entry.sha256), entry)
        return entries

    def _upload(self, path: Path, target: str, entry: FileEntry) -> None:
        for _ in range(2):
            with named_errors(self.settings, f"uploading {path.name}"):
                self.client.upload_file(str(path), self.settings.bucket, self.settings.key(target))
            if self.remote_sha256(target) == entry.sha256:
                return
        raise IntegrityError(
            f"{path.name} read back from the store is not what was written, twice",
            next_step="check the S3 server and the network between; nothing was committed",
        )

    def remote_sha256(self, path: str) -> str | None:
        """Read an object back and return its sha256, or None where there is none."""
        digest = hashlib.sha256()
        with named_errors(self.settings, f"reading back {path}"):
            try:
                body = self.client.get_object(Bucket=self.settings.bucket, Key=self.settings.key(path))[
                    "Body"
                ]
            except ClientError as error:
                if error_code(error) in MISSING_CODES:
                    return None
                raise
            for chunk in body.iter_chunks(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def _put_once(self, path: str, content: bytes) -> None:
        try:
            self.put(path, content, if_none_match=True)
        except ConflictError:
            return

    # Read.

    def find(self, stage_key: str) -> ArtifactRef | None:
        """Return the result of a stage, where it is whole.

        Raises:
            IntegrityError: The result is named, but a file of it is missing or has another size.
        """
        found = self.get(f"stages/{stage_key}.json")
        if found is None:
            return None
        ref = ArtifactRef.model_validate_json(found[0])
        for name, entry in self.manifest(ref).files.items():
            if self.size_of(blob_path(entry.sha256)) != entry.size_bytes:
                raise IntegrityError(
                    f"{name} of artifact {ref} is missing from the store or cut short",
                    next_step="run `prefline fsck --repair`: it forgets the damaged result, and the stage runs again",
                )
        return ref

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Return an artifact's manifest, checked against its id.

        Raises:
            IntegrityError: It is not there, or not the one that the id names.
        """
        found = self.get(f"artifacts/{ref.id}/manifest.json")
        if found is None:
            raise IntegrityError(f"artifact {ref} has no manifest", next_step="run `prefline fsck`")
        manifest = Manifest.model_validate_json(found[0])
        if manifest.id != ref.id:
            raise IntegrityError(f"the manifest of {ref} was altered", next_step="run `prefline fsck`")
        return manifest

    def list_artifacts(self) -> Iterator[ArtifactRef]:
        """Yield every committed artifact."""
        for path, _ in self.list("artifacts/"):
            raw = self.get(path)
            if raw is not None:
                yield ArtifactRef(kind=json.loads(raw[0])["kind"], id=path.split("/")[1])

    def open_bytes(self, ref: ArtifactRef, path: str) -> bytes:
        """Return a file of an artifact, checked against its sha256."""
        if self.cache_directory is None:
            return self._download_bytes(ref, path)
        entry = entry_of(self.manifest(ref).files, ref, path)
        return self._cached(entry, label=f"{path} of artifact {ref}").read_bytes()

    def read_json(self, ref: ArtifactRef, path: str) -> Any:
        """Return a JSON file of an artifact."""
        return json.loads(self.open_bytes(ref, path))

    def read_lines(self, ref: ArtifactRef, path: str) -> Iterator[bytes]:
        """Yield the lines of a file of an artifact, without their ends."""
        for line in self.open_bytes(ref, path).split(b"\n"):
            if line:
                yield line

    def fetch(self, ref: ArtifactRef, directory: Path, *, paths: list[str] | None = None) -> Path:
        """Write an artifact's verified files into a directory.

        Raises:
            IntegrityError: A file is missing or is not what the manifest promises.
            DiskFullError: The disk has no room for it.
        """
        files = self.manifest(ref).files
        for name in paths if paths is not None else files:
            self.fetch_blob(entry_of(files, ref, name), directory / name, label=f"{name} of artifact {ref}")
        return directory

    def fetch_blob(self, entry: FileEntry, target: Path, *, label: str) -> None:
        """Write one verified blob to a path: out of the cache by a link, else downloaded."""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if self.cache_directory is None:
            self.download(blob_path(entry.sha256), entry, target, label=label)
            return
        cached = self._cached(entry, label=label)
        try:
            os.link(cached, target)
        except OSError:  # another file system
            shutil.copyfile(cached, target)

    def _cached(self, entry: FileEntry, *, label: str) -> Path:
        """Return a verified blob in the cache, downloaded where it is not there."""
        assert self.cache_directory is not None
        cached = self.cache_directory / entry.sha256[:2] / entry.sha256
        if not (cached.is_file() and sha256_file(cached) == entry.sha256):
            cached.parent.mkdir(parents=True, exist_ok=True)
            self.download(blob_path(entry.sha256), entry, cached, label=label)
        return cached

    def _download_bytes(self, ref: ArtifactRef, path: str) -> bytes:
        entry = entry_of(self.manifest(ref).files, ref, path)
        found = self.get(blob_path(entry.sha256))
        if found is None or sha256_bytes(found[0]) != entry.sha256:
            raise _damaged(f"{path} of artifact {ref}", missing=found is None)
        return found[0]

    def download(self, path: str, entry: FileEntry, target: Path, *, label: str) -> None:
        """Stream an object to a temporary file beside the target, check its sha256, and rename it."""
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".download-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file, named_errors(self.settings, f"downloading {label}"):
                try:
                    body = self.client.get_object(Bucket=self.settings.bucket, Key=self.settings.key(path))[
                        "Body"
                    ]
                except ClientError as error:
                    if error_code(error) in MISSING_CODES:
                        raise _damaged(label, missing=True) from error
                    raise
                for chunk in body.iter_chunks(1 << 20):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if sha256_file(temporary) != entry.sha256:
                raise _damaged(label, missing=False)
            temporary.replace(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(target.parent).free
                raise DiskFullError(
                    f"no room for {label} in {target.parent}: needs {entry.size_bytes:,} bytes, {free:,} are free",
                    next_step="free some space and run the same command again",
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def download_prefix(self, uri: str, directory: Path) -> Path:
        """Download every object below an `s3://bucket/prefix` into a directory (a base model's folder)."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        other = self.settings.model_copy(update={"bucket": bucket, "prefix": ""})
        source = ArtifactStore(other)
        count = 0
        for path, _ in source.list(prefix.rstrip("/") + "/"):
            target = directory / path.removeprefix(prefix.rstrip("/") + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with named_errors(other, f"downloading {path}"):
                source.client.download_file(bucket, path, str(target))
            count += 1
        if count == 0:
            raise ModelNotFoundError(f"there is nothing at {uri}", next_step="check model.source")
        return directory

    def check_conditional_writes(self) -> None:
        """Try once whether the server honours conditional writes.

        Raises:
            ConditionalWriteError: It answers 200 to a conditional write that must fail.
        """
        place = (self.settings.endpoint_url, self.settings.bucket)
        if place in _checked_endpoints:
            return
        path = f"probes/{os.getpid()}-{os.urandom(6).hex()}"
        etag = self.put(path, b"1")
        try:
            for condition in ({"if_none_match": True}, {"if_match": '"0123456789abcdef0123456789abcdef"'}):
                try:
                    self.put(path, b"2", **condition)  # type: ignore[arg-type]
                except ConflictError:
                    continue
                raise ConditionalWriteError(
                    f"the S3 server {self.settings.endpoint_url} accepts a conditional write that must fail",
                    next_step="use a server with conditional writes (Amazon S3, SeaweedFS, MinIO), "
                    "or leave PREFLINE_S3_ENDPOINT unset for the embedded one",
                )
            self.put(path, b"3", if_match=etag)
        finally:
            self.delete(path)
        _checked_endpoints.add(place)


def entry_of(files: Mapping[str, FileEntry], ref: ArtifactRef, path: str) -> FileEntry:
    """Return the entry of a file.

    Raises:
        IntegrityError: The artifact has no such file.
    """
    if path not in files:
        raise IntegrityError(
            f"artifact {ref} has no file {path!r}",
            next_step="its stage made another version's files: run it again",
        )
    return files[path]


def _damaged(label: str, *, missing: bool) -> IntegrityError:
    what = "is missing from the store" if missing else "is not what its manifest promises (sha256 differs)"
    return IntegrityError(
        f"{label} {what}",
        next_step="run `prefline fsck --repair`, then the same command: the stage runs again",
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
