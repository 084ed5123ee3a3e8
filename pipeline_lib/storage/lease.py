"""Leases: one process works on a stage; a dead one's lease is taken over, never waited on for ever.

A lease is an object that its holder rewrites while it lives. Its age is the S3 server's `Date`
minus the object's `Last-Modified`, so no local clock is asked. Every take-over raises the token;
a holder whose token is no longer the stored one has lost the lease and may not commit.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

import psutil
from botocore.exceptions import ClientError

from pipeline_lib.errors import ConflictError, HeldError, PipelineError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.storage.s3 import MISSING_CODES, error_code, named_errors
from pipeline_lib.storage.store import ArtifactStore

EXPIRY_S = 60.0
RENEW_EVERY_S = 15.0
WAIT_FOR_ORPHAN_S = 45.0
"""How long to wait for a process of this machine that is about to end (its parent is gone)."""


class Lease:
    """A held lease; a context manager that releases it."""

    def __init__(self, store: ArtifactStore, path: str, *, owner: str, token: int, etag: str) -> None:
        """Made by `acquire`."""
        self.store, self.owner, self.token = store, owner, token
        self._path, self._etag = path, etag
        self._lost = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._renewer = threading.Thread(target=self._renew_for_ever, name=f"lease-{owner}", daemon=True)
        self._renewer.start()

    @classmethod
    def acquire(cls, store: ArtifactStore, key: str, *, owner: str) -> Lease:
        """Take the lease of a stage key.

        Raises:
            HeldError: A live process holds it.
        """
        path = f"leases/{key}.json"
        deadline = time.monotonic() + WAIT_FOR_ORPHAN_S
        while True:
            found = _read(store, path)
            token = 1 if found is None else int(found[0]["token"]) + 1
            if found is not None and not _is_free(found[0], found[2]):
                if _is_orphan(found[0]) and time.monotonic() < deadline:
                    # It got SIGTERM when its parent died and is committing a checkpoint.
                    threading.Event().wait(0.5)
                    continue
                raise HeldError(
                    f"held by {found[0]['owner']} (host {found[0]['host']}, process {found[0]['pid']}), "
                    f"renewed {found[2]:.0f} s ago",
                    next_step=f"wait for that run, or end it; its lease ends by itself {EXPIRY_S:.0f} s after",
                )
            value = {
                "owner": owner, "host": socket.gethostname(), "pid": os.getpid(),
                "started": psutil.Process().create_time(), "token": token, "released": False,
            }  # fmt: skip
            try:
                etag = (
                    store.put(path, canonical_json(value), if_none_match=True)
                    if found is None
                    else store.put(path, canonical_json(value), if_match=found[1])
                )
            except ConflictError:
                continue
            return cls(store, path, owner=owner, token=token, etag=etag)

    def assert_held(self) -> None:
        """Check with the store that the lease is still this process's.

        Raises:
            HeldError: Another process took it over.
        """
        found = _read(self.store, self._path)
        if self._lost or found is None or int(found[0]["token"]) != self.token:
            raise HeldError(
                f"the lease of {self.owner} was taken over by another process",
                next_step="nothing was committed here; the other process goes on",
            )

    def release(self) -> None:
        """Give the lease back; the token stays, so a later holder's is higher."""
        self._closed.set()
        with self._lock:
            self._write(released=True)

    def __enter__(self) -> Lease:
        """Return the lease."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it; where the store is gone, it ends by itself."""
        try:
            self.release()
        except PipelineError:
            if error is None:
                raise

    def _renew_for_ever(self) -> None:
        while not self._closed.wait(RENEW_EVERY_S):
            with self._lock:
                if self._closed.is_set():
                    return
                try:
                    self._write(released=False)
                except PipelineError as error:
                    if not error.is_transient:
                        return

    def _write(self, *, released: bool) -> None:
        if self._lost:
            return
        value = {
            "owner": self.owner, "host": socket.gethostname(), "pid": os.getpid(),
            "started": psutil.Process().create_time(), "token": self.token, "released": released,
        }  # fmt: skip
        try:
            self._etag = self.store.put(self._path, canonical_json(value), if_match=self._etag)
        except ConflictError:
            self._lost = True


def _read(store: ArtifactStore, path: str) -> tuple[dict[str, Any], str, float] | None:
    """Return a lease's value, ETag and age in seconds by the server's clock."""
    with named_errors(store.settings, f"reading {path}"):
        try:
            answer = store.client.get_object(Bucket=store.settings.bucket, Key=store.settings.key(path))
        except ClientError as error:
            if error_code(error) in MISSING_CODES:
                return None
            raise
        value = json.loads(answer["Body"].read())
    sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(sent) if sent else datetime.now(UTC)
    return value, answer["ETag"], (now - answer["LastModified"]).total_seconds()


def _is_free(value: dict[str, Any], age_s: float) -> bool:
    if value["released"] or age_s > EXPIRY_S:
        return True
    return bool(value["host"] == socket.gethostname()) and _process(value) is None


def _is_orphan(value: dict[str, Any]) -> bool:
    """Tell whether the holder is a process of this machine whose parent is gone."""
    if value["host"] != socket.gethostname():
        return False
    process = _process(value)
    return process is None or process.ppid() == 1


def _process(value: dict[str, Any]) -> psutil.Process | None:
    """Return the holder's process, where it lives on this machine and is the same one."""
    try:
        process = psutil.Process(int(value["pid"]))
        if (
            process.status() == psutil.STATUS_ZOMBIE
            or abs(process.create_time() - float(value["started"])) > 1.0
        ):
            return None
    except psutil.NoSuchProcess:
        return None
    return process
