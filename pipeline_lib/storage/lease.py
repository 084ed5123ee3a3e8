"""Leases: one process works on a stage; a dead one's lease is taken over, never waited on for ever.

A lease is an object that its holder rewrites while it lives. Its age is the S3 server's `Date`
minus the object's `Last-Modified`, so no local clock is asked. Every take-over raises the token;
a holder whose token is no longer the stored one has lost the lease and may not commit.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Literal

import psutil
from pydantic import ValidationError

from pipeline_lib.errors import ConflictError, HeldError, PipelineError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import Frozen

EXPIRY_S = 60.0
"""Age at which a lease that nobody renews is free."""
RENEWALS_PER_EXPIRY = 4
ORPHAN_GRACE_S = 45.0
"""How long to wait for a process of this machine that is about to end (its starter is gone)."""
STARTER_VARIABLE = "PREFLINE_FLOW_PID"
"""Process of the flow that a stage's process works for."""
_LOOK_EVERY_S = 0.5
_SAME_START_S = 30.0
"""Start times of one process may differ by this much where the clock was set in between."""


class Holder(Frozen):
    """Who holds a lease, as it is stored."""

    owner: str
    host: str
    boot: str = ""
    """Differs between boots of a machine and between containers that share a host name."""
    pid: int
    starter: int = 0
    """The process that the holder works for; 0: none, it is a run's own."""
    started: float
    """When the process started, seconds since 1970 by its machine's clock."""
    token: int
    renewals: int = 0
    """Rises with every renewal, so that each has its own ETag."""
    released: bool = False
    expiry_s: float = EXPIRY_S

    @classmethod
    def this_process(cls, *, owner: str, token: int, expiry_s: float) -> Holder:
        """Describe this process as a holder."""
        return cls(
            owner=owner, host=socket.gethostname(), boot=_boot(), pid=os.getpid(),
            starter=int(os.environ.get(STARTER_VARIABLE, "0")), started=psutil.Process().create_time(), token=token,
            expiry_s=expiry_s,
        )  # fmt: skip

    def is_same(self, other: Holder | None) -> bool:
        """Tell whether two states are of one and the same holding."""
        return other is not None and self.model_copy(update={"renewals": other.renewals}) == other

    def state(self) -> Literal["alive", "orphan", "dead", "unknown"]:
        """Tell what is known of the holder's process; only this machine's own can be looked at."""
        if self.host != socket.gethostname() or self.boot != _boot():
            return "unknown"
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return "dead"
            if abs(process.create_time() - self.started) > _SAME_START_S:
                return "dead"  # another process was given the same number
            return "alive" if self.starter == 0 or psutil.pid_exists(self.starter) else "orphan"
        except psutil.NoSuchProcess:
            return "dead"


class Lease:
    """A held lease; a context manager that releases it."""

    def __init__(self, store: ArtifactStore, path: str, holder: Holder, etag: str) -> None:
        """Made by `acquire`."""
        self._store, self._path, self._holder, self._etag = store, path, holder, etag
        self._renewals = 0
        self._is_lost = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._renewer = threading.Thread(target=self._renew_for_ever, name=f"lease-{holder.owner}", daemon=True)
        self._renewer.start()

    @classmethod
    def acquire(cls, store: ArtifactStore, key: str, *, owner: str, expiry_s: float = EXPIRY_S) -> Lease:
        """Take the lease of a stage key.

        One of a process that is known to be dead is taken at once. One of a process of which
        nothing is known is waited for until it is renewed or expires, which is at most `expiry_s`.

        Args:
            store: The store.
            key: What is leased: a stage key.
            owner: The holder's name for messages.
            expiry_s: Age at which others may take it where it is not renewed.

        Raises:
            HeldError: A live process holds it.
        """
        path, waiting = f"leases/{key}.json", _Waiting()
        while True:
            found = _read(store, path)
            if found is not None and not waiting.is_over(*found):
                waiting.pause()
                continue
            token = 1 if found is None or found[0] is None else found[0].token + 1
            holder = Holder.this_process(owner=owner, token=token, expiry_s=expiry_s)
            try:
                if found is None:
                    etag = store.objects.put(path, _dump(holder), if_none_match=True)
                else:
                    etag = store.objects.put(path, _dump(holder), if_match=found[1])
            except ConflictError:
                continue
            return cls(store, path, holder, etag)

    @property
    def token(self) -> int:
        """The fencing token: higher than that of every earlier holder."""
        return self._holder.token

    @property
    def owner(self) -> str:
        """The holder's name."""
        return self._holder.owner

    def assert_held(self) -> None:
        """Check with the store that the lease is still this process's.

        Raises:
            HeldError: Another process took it over.
        """
        found = _read(self._store, self._path)
        if self._is_lost or found is None or not self._holder.is_same(found[0]):
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
        while not self._closed.wait(self._holder.expiry_s / RENEWALS_PER_EXPIRY):
            with self._lock:
                if self._closed.is_set():
                    return
                try:
                    self._write()
                except PipelineError as error:
                    if not error.is_transient:
                        return

    def _write(self, *, released: bool = False) -> None:
        if self._is_lost:
            return
        self._renewals += 1
        holder = self._holder.model_copy(update={"renewals": self._renewals, "released": released})
        try:
            self._etag = self._put(holder, etag=self._etag)
        except ConflictError:
            self._is_lost = True

    def _put(self, holder: Holder, *, etag: str) -> str:
        """Write the lease over the state that is known; where that is an earlier renewal's, over that one."""
        try:
            return self._store.objects.put(self._path, _dump(holder), if_match=etag)
        except ConflictError:
            found = _read(self._store, self._path)
            if found is None or not self._holder.is_same(found[0]):
                raise
            # A renewal of ours was written, and its answer got lost.
            return self._store.objects.put(self._path, _dump(holder), if_match=found[1])


class _Waiting:
    """Decides how long a lease that is not free is worth waiting for."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._last_etag: str | None = None

    def is_over(self, holder: Holder | None, etag: str, age_s: float) -> bool:
        """Tell whether the lease may be taken; an unreadable one may.

        Raises:
            HeldError: It is held by a live process.
        """
        if holder is None or holder.released or age_s > holder.expiry_s:
            return True
        state = holder.state()
        if state == "dead":
            return True
        is_renewed = self._last_etag not in (None, etag)
        self._last_etag = etag
        # An orphan gets SIGTERM when its starter dies, and is committing a checkpoint.
        is_ending = state == "orphan" and time.monotonic() - self._since < ORPHAN_GRACE_S
        if is_ending or (state == "unknown" and not is_renewed):
            return False
        raise HeldError(
            f"held by {holder.owner} (host {holder.host}, process {holder.pid}), renewed {age_s:.0f} s ago",
            next_step=f"wait for that run, or end it; its lease ends by itself {holder.expiry_s:.0f} s after",
        )

    def pause(self) -> None:
        """Wait a moment before the next look."""
        threading.Event().wait(_LOOK_EVERY_S)


def _read(store: ArtifactStore, path: str) -> tuple[Holder | None, str, float] | None:
    """Return a lease's holder (None where it is unreadable), its ETag and age in seconds."""
    found = store.objects.get(path)
    if found is None:
        return None
    try:
        return Holder.model_validate_json(found.content), found.etag, found.age_s
    except ValidationError:
        return None, found.etag, found.age_s


def _dump(holder: Holder) -> bytes:
    return canonical_json(holder.model_dump())


def _boot() -> str:
    """Return what tells one boot, and one container, of a machine from another; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
