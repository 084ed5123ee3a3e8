"""Leases: one live holder; a dead one's is taken at once or when it expires, and its token is stale."""

from __future__ import annotations

import multiprocessing
import os
import socket
from typing import Any

import pytest

from pipeline_lib.errors import HeldError
from pipeline_lib.storage.lease import Holder, Lease, _Waiting
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

KEY = "ab" * 32
PATH = f"leases/{KEY}.json"


def stored(store: ArtifactStore) -> Holder:
    found = store.objects.get(PATH)
    assert found is not None
    return Holder.model_validate_json(found.content)


def place(store: ArtifactStore, **changed: Any) -> Holder:
    """Store a lease as another process would have left it."""
    holder = Holder.this_process(owner="other", token=7, expiry_s=60).model_copy(update=changed)
    store.objects.put(PATH, holder.model_dump_json().encode())
    return holder


def test_one_holder_and_rising_tokens(store: ArtifactStore) -> None:
    with Lease.acquire(store, KEY, owner="first") as first:
        assert first.token == 1
        first.assert_held()
        with pytest.raises(HeldError, match=rf"held by first \(host {socket.gethostname()}, process {os.getpid()}\)"):
            Lease.acquire(store, KEY, owner="second")
        with Lease.acquire(store, "cd" * 32, owner="elsewhere") as other:
            assert other.token == 1
    assert stored(store).released
    with Lease.acquire(store, KEY, owner="second") as second:
        assert second.token == 2
        with pytest.raises(HeldError, match="the lease of first was taken over"):
            first.assert_held()
        second.assert_held()


def hold_until_killed(settings: S3Settings, pipe: Any) -> None:
    lease = Lease.acquire(ArtifactStore(settings), KEY, owner="child")
    pipe.send(lease.token)
    pipe.recv()


def test_a_killed_holder_is_replaced_at_once(store: ArtifactStore) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=hold_until_killed, args=(store.settings, there))
    child.start()
    assert here.poll(30)
    assert here.recv() == 1
    with pytest.raises(HeldError, match=f"held by child .*process {child.pid}"):
        Lease.acquire(store, KEY, owner="test")
    child.kill()
    child.join()
    with Lease.acquire(store, KEY, owner="test") as lease:
        assert lease.token == 2


def test_a_holder_on_another_machine_is_waited_for_until_it_expires(store: ArtifactStore) -> None:
    place(store, host="elsewhere", expiry_s=1.0)
    with Lease.acquire(store, KEY, owner="test") as lease:
        assert lease.token == 8


def test_one_that_is_renewed_is_alive(store: ArtifactStore) -> None:
    """The holder calls itself by another host's name, but it renews its lease."""
    with Lease.acquire(store, KEY, owner="far", expiry_s=8.0) as far:
        with far._lock:  # the renewer writes too
            far._holder = far._holder.model_copy(update={"host": "elsewhere"})
            far._write()
        with pytest.raises(HeldError, match="held by far"):
            Lease.acquire(store, KEY, owner="test")
        far.assert_held()


def test_a_renewal_whose_answer_got_lost_is_still_ours(store: ArtifactStore) -> None:
    with Lease.acquire(store, KEY, owner="first") as lease:
        with lease._lock:
            written = lease._holder.model_copy(update={"renewals": 5})
            store.objects.put(PATH, written.model_dump_json().encode())
            lease._write()
        lease.assert_held()
        # Another's is another's, however it came there.
        with lease._lock:
            place(store, token=2)
            lease._write()
        with pytest.raises(HeldError, match="taken over"):
            lease.assert_held()


@pytest.mark.parametrize(
    "changed",
    [
        {"released": True},
        {"pid": 2**22 + 7},  # above the highest number that Linux gives
        {"started": 12345.0},  # the number was given to another process since
    ],
)
def test_who_is_known_to_be_gone_is_replaced_at_once(store: ArtifactStore, changed: dict[str, Any]) -> None:
    place(store, **changed)
    with Lease.acquire(store, KEY, owner="test") as lease:
        assert lease.token == 8


@pytest.mark.parametrize(
    ("changed", "state"),
    [
        ({}, "alive"),
        ({"starter": os.getpid()}, "alive"),
        ({"starter": 2**22 + 7}, "orphan"),
        ({"host": "elsewhere"}, "unknown"),
        ({"boot": "before the restart"}, "unknown"),
        ({"pid": 2**22 + 7}, "dead"),
        ({"started": 12345.0}, "dead"),
    ],
)
def test_what_is_known_of_a_holder(changed: dict[str, Any], state: str) -> None:
    holder = Holder.this_process(owner="x", token=1, expiry_s=60).model_copy(update=changed)
    assert holder.state() == state


def test_when_another_machines_lease_is_free() -> None:
    """It is looked at until it is renewed, which proves its holder alive, or is as old as it may get."""
    far = Holder.this_process(owner="far", token=1, expiry_s=60).model_copy(update={"host": "elsewhere"})
    waiting = _Waiting()
    assert waiting.is_over(far, "etag-1", 1.0) is False
    assert waiting.is_over(far, "etag-1", 60.0) is False
    assert waiting.is_over(far, "etag-1", 60.1) is True
    with pytest.raises(HeldError, match=r"held by far .* renewed 0 s ago"):
        waiting.is_over(far, "etag-2", 0.0)


def test_an_orphan_is_given_time_to_commit_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = Holder.this_process(owner="child", token=1, expiry_s=60).model_copy(update={"starter": 2**22 + 7})
    waiting = _Waiting()
    assert waiting.is_over(orphan, "etag-1", 1.0) is False
    assert waiting.is_over(orphan, "etag-2", 1.0) is False
    monkeypatch.setattr("pipeline_lib.storage.lease.ORPHAN_GRACE_S", 0.0)
    with pytest.raises(HeldError, match="held by child"):
        waiting.is_over(orphan, "etag-2", 1.0)


@pytest.mark.parametrize("is_there", [True, False])
def test_of_two_who_take_a_free_lease_one_has_it(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """Another process takes it between this one's look and its write."""
    if is_there:
        place(store, released=True)
    put = store.objects.put

    def put_second(path: str, content: bytes, **condition: Any) -> str:
        monkeypatch.undo()
        place(store, owner="faster", token=8)
        return put(path, content, **condition)

    monkeypatch.setattr(store.objects, "put", put_second)
    with pytest.raises(HeldError, match="held by faster"):
        Lease.acquire(store, KEY, owner="test")
    assert stored(store).owner == "faster"


def test_an_unreadable_lease_is_taken_over(store: ArtifactStore) -> None:
    store.objects.put(PATH, b"{")
    with Lease.acquire(store, KEY, owner="test") as lease:
        lease.assert_held()


def test_who_lost_the_lease_does_not_write_it_again(store: ArtifactStore) -> None:
    """A holder that stood still past its expiry wakes up: it must neither renew nor release."""
    lease = Lease.acquire(store, KEY, owner="slow")
    taken = place(store, owner="fast")
    lease._write()
    lease.release()
    assert stored(store) == taken
    with pytest.raises(HeldError, match="lease of slow"):
        lease.assert_held()
