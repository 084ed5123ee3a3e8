"""Objects in a bucket: the few calls that artifacts, pointers, leases and checkpoints are made of.

Bytes are hashed on their way: an upload is read back, a download becomes a file only when its
sha256 is right. Ages come from the server's clock.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

from pipeline_lib.errors import ConditionalWriteError, ConflictError, DiskFullError, IntegrityError
from pipeline_lib.storage.s3 import (
    MISSING_CODES,
    PRECONDITION_CODES,
    S3Settings,
    error_code,
    named_errors,
    open_client,
)

if TYPE_CHECKING:
    from botocore.response import StreamingBody

_CHUNK_BYTES = 1 << 20
_MULTIPART = TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=32 << 20, max_concurrency=2)
_BODY_ATTEMPTS = 3
"""Tries of reading one body: botocore repeats a request, but not a stream that broke half-way."""
_conditional_servers: set[tuple[str | None, str]] = set()
"""Server and bucket of which this process knows that they honour conditional writes."""

T = TypeVar("T")


class Stored(NamedTuple):
    """An object as it was read."""

    content: bytes
    etag: str
    age_s: float
    """Seconds since it was written, by the server's clock."""


class Head(NamedTuple):
    """What is known of an object without reading it."""

    size_bytes: int
    age_s: float


class Listed(NamedTuple):
    """An object in a listing."""

    path: str
    size_bytes: int
    age_s: float


class Upload(NamedTuple):
    """An upload in parts that has not ended."""

    path: str
    upload_id: str
    age_s: float


class Objects:
    """The objects below a bucket's prefix, by their paths."""

    def __init__(self, settings: S3Settings) -> None:
        """Open the connection; nothing is asked yet."""
        self.settings = settings
        self.client = open_client(settings)

    def get(self, path: str) -> Stored | None:
        """Return an object, or None where there is none."""

        def read(body: StreamingBody, answer: Any) -> Stored:
            return Stored(body.read(), answer["ETag"], _age_s(answer, answer["LastModified"]))

        return self._read(path, f"reading {path}", read)

    def put(self, path: str, content: bytes, *, if_none_match: bool = False, if_match: str | None = None) -> str:
        """Write an object, under a condition where one is given, and return its ETag.

        An ETag names content: a value that went away and came back counts as unchanged.

        Args:
            path: Where.
            content: What.
            if_none_match: Write only where there is nothing.
            if_match: Write only where the object has this ETag.

        Raises:
            ConflictError: The condition does not hold.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_none_match else {}
        if if_match is not None:
            condition["IfMatch"] = if_match
        with named_errors(self.settings, f"writing {path}"):
            try:
                answer = self.client.put_object(
                    Bucket=self.settings.bucket, Key=self.settings.key(path), Body=content, **condition
                )
                return answer["ETag"]
            except ClientError as error:
                if condition and error_code(error) in ("501", "NotImplemented"):
                    raise self._unconditional() from error
                refused = PRECONDITION_CODES | MISSING_CODES if condition else frozenset[str]()
                if error_code(error) not in refused:
                    raise
                # Where an answer got lost, the repeated request meets its own first write.
                if error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0:
                    found = self.get(path)
                    if found is not None and found.content == content:
                        return found.etag
                raise ConflictError(
                    f"another process wrote {path} first", next_step="run the same command again"
                ) from error

    def delete(self, path: str) -> None:
        """Delete an object; one that is not there is no error."""
        with named_errors(self.settings, f"deleting {path}"):
            self.client.delete_object(Bucket=self.settings.bucket, Key=self.settings.key(path))

    def list(self, prefix: str) -> Iterator[Listed]:
        """Yield every object whose path begins with a prefix."""
        start = len(self.settings.key(""))
        with named_errors(self.settings, f"listing {prefix}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.settings.bucket, Prefix=self.settings.key(prefix)
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    yield Listed(entry["Key"][start:], entry["Size"], _age_s(page, entry["LastModified"]))

    def uploads(self) -> Iterator[Upload]:
        """Yield every upload in parts that was begun and neither ended nor given up."""
        start = len(self.settings.key(""))
        with named_errors(self.settings, "listing uploads"):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.settings.bucket, Prefix=self.settings.key("")
            )
            for page in pages:
                for entry in page.get("Uploads", []):
                    yield Upload(entry["Key"][start:], entry["UploadId"], _age_s(page, entry["Initiated"]))

    def give_up(self, upload: Upload) -> None:
        """End an upload without an object."""
        with named_errors(self.settings, f"giving up the upload of {upload.path}"):
            self.client.abort_multipart_upload(
                Bucket=self.settings.bucket, Key=self.settings.key(upload.path), UploadId=upload.upload_id
            )

    def head(self, path: str) -> Head | None:
        """Return an object's size and age, or None where there is none."""
        with named_errors(self.settings, f"looking at {path}"):
            try:
                answer = self.client.head_object(Bucket=self.settings.bucket, Key=self.settings.key(path))
            except ClientError as error:
                if error_code(error) in MISSING_CODES:
                    return None
                raise
        return Head(answer["ContentLength"], _age_s(answer, answer["LastModified"]))

    def sha256_of(self, path: str) -> str | None:
        """Read an object through and return its sha256, or None where there is none."""

        def read(body: StreamingBody, answer: Any) -> str:  # noqa: ARG001  (the signature of `_read`)
            digest = hashlib.sha256()
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                digest.update(chunk)
            return digest.hexdigest()

        return self._read(path, f"reading back {path}", read)

    def upload(self, file: Path, path: str, *, sha256: str) -> None:
        """Upload a file, in parts where it is big, and read it back.

        Raises:
            IntegrityError: What was read back twice is not what was written.
        """
        for _ in range(2):
            # By its name, not as an open file, of which the parts would be held in memory.
            with (
                named_errors(self.settings, f"uploading {file.name}"),
                create_transfer_manager(self.client, _MULTIPART) as transfers,
            ):
                transfers.upload(str(file), self.settings.bucket, self.settings.key(path)).result()
            if self.sha256_of(path) == sha256:
                return
        raise IntegrityError(
            f"{file.name} read back from the store is not what was written, twice",
            next_step="check the S3 server and the network between; nothing was committed",
        )

    def download(self, path: str, target: Path, *, sha256: str | None, size_bytes: int, label: str) -> None:
        """Write an object to a file that appears only once its sha256 is right.

        Args:
            path: The object.
            target: The file; its directory is made.
            sha256: What it must have; None where nobody promised anything.
            size_bytes: What it must have.
            label: Its name in messages, e.g. `model.safetensors of artifact model/0123`.

        Raises:
            IntegrityError: It is missing, or not what was promised.
            DiskFullError: The disk has no room for it.
        """
        with appearing_file(target, label=label, needed_bytes=size_bytes) as file:

            def write(body: StreamingBody, answer: Any) -> str:
                digest = hashlib.sha256()
                file.seek(0)
                file.truncate()
                if answer["ContentLength"] == size_bytes:
                    for chunk in body.iter_chunks(_CHUNK_BYTES):
                        file.write(chunk)
                        digest.update(chunk)
                return digest.hexdigest()

            found = self._read(path, f"downloading {label}", write)
            if found is None or found != (sha256 or found):
                raise damaged(label, is_missing=found is None)

    def check_conditional_writes(self) -> None:
        """Try, once a process, whether the server honours conditional writes.

        Raises:
            ConditionalWriteError: It answers 200 to a conditional write that must fail.
        """
        server = (self.settings.endpoint_url, self.settings.bucket)
        if server in _conditional_servers:
            return
        path = f"probes/{os.getpid()}-{os.urandom(6).hex()}"
        etag = self.put(path, b"1")
        try:
            is_honoured = (
                self._is_refused(path, if_none_match=True)
                and self._is_refused(path, if_match='"0123456789abcdef0123456789abcdef"')
                and not self._is_refused(path, if_match=etag)
            )
        finally:
            self.delete(path)
        if not is_honoured:
            raise self._unconditional()
        _conditional_servers.add(server)

    def _unconditional(self) -> ConditionalWriteError:
        return ConditionalWriteError(
            f"the S3 server {self.settings.place} does not honour conditional writes (If-Match, If-None-Match)",
            next_step="use a server that does (Amazon S3, SeaweedFS, MinIO), "
            "or leave PREFLINE_S3_ENDPOINT unset for the embedded one",
        )

    def _is_refused(self, path: str, *, if_none_match: bool = False, if_match: str | None = None) -> bool:
        try:
            self.put(path, b"2", if_none_match=if_none_match, if_match=if_match)
        except ConflictError:
            return True
        return False

    def _read(self, path: str, action: str, consume: Callable[[StreamingBody, Any], T]) -> T | None:
        """Give an object's body to `consume`, anew where the stream breaks; None where there is none."""
        with named_errors(self.settings, action):
            for attempt in range(_BODY_ATTEMPTS):
                try:
                    answer = self.client.get_object(Bucket=self.settings.bucket, Key=self.settings.key(path))
                except ClientError as error:
                    if error_code(error) in MISSING_CODES:
                        return None
                    raise
                try:
                    return consume(answer["Body"], answer)
                except (HTTPClientError, IncompleteReadError):
                    if attempt == _BODY_ATTEMPTS - 1:
                        raise
                finally:
                    answer["Body"].close()
        raise AssertionError("the last attempt returns or raises")


@contextmanager
def appearing_file(target: Path, *, label: str, needed_bytes: int) -> Iterator[IO[bytes]]:
    """Open a temporary file beside the target that takes its place when all went well.

    Raises:
        DiskFullError: The disk has no room; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".download-")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(_existing(target.parent)).free
        raise DiskFullError(
            f"no room for {label} in {target.parent}: needs {needed_bytes:,} bytes, {free:,} are free",
            next_step="free some space and run the same command again; finished stages do not run again",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def damaged(label: str, *, is_missing: bool) -> IntegrityError:
    """Return the error of a file that is missing or is not what was promised."""
    what = "is missing from the store" if is_missing else "is not what its manifest promises (sha256 differs)"
    return IntegrityError(
        f"{label} {what}",
        next_step="run `prefline fsck --repair`, then the same command: what is damaged is made again",
    )


def _existing(directory: Path) -> Path:
    return next(place for place in (directory, *directory.parents) if place.exists())


def _age_s(answer: Any, modified: datetime) -> float:
    """Return an object's age by the `Date` of the server's answer."""
    sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(sent) if sent else datetime.now(UTC)
    return (now - modified).total_seconds()
