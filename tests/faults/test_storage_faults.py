"""Bad networks, bad servers, full disks, kills: each has its name, and nothing half is ever visible."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore import retryhandler

from pipeline_lib.errors import (
    AuthError,
    BucketError,
    ConditionalWriteError,
    DiskFullError,
    HeldError,
    IntegrityError,
    PipelineError,
    StorageError,
)
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.embedded import free_port_pairs
from pipeline_lib.storage.fsck import check
from pipeline_lib.storage.lease import Lease
from pipeline_lib.storage.pointer import Pointer
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from tests.s3_proxy import Answer, Forward, Request, proxied, refusal, without_conditions

pytestmark = pytest.mark.servers

KEY = "ab" * 32
FILES = {"config.json": b'{"a": 1}', "weights.bin": bytes(range(256)) * 500}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat requests at once."""
    monkeypatch.setattr(retryhandler, "delay_exponential", lambda base, growth_factor, attempts: 0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "in"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    return directory


def commit(store: ArtifactStore, directory: Path, **changed: Any) -> ArtifactRef:
    arguments: dict[str, Any] = {
        "kind": "model", "stage": "sft", "stage_version": 1, "config": {}, "inputs": {}, "metrics": {},
        "measurements": {}, "stage_key": KEY,
    }  # fmt: skip
    return store.commit(directory, **{**arguments, **changed})


def assert_two_lines(error: PipelineError, *, exit_code: int) -> None:
    """An error is one line of cause and one of what to do, and ends the command with its own code."""
    assert error.exit_code == exit_code
    first, second = str(error).splitlines()
    assert first.startswith(f"{error.code}: ")
    assert second.startswith("  next: ")


# Settings that are wrong.


def test_nothing_listens_at_the_endpoint(settings: S3Settings) -> None:
    port = free_port_pairs(1)[0]
    nowhere = settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{port}"})
    with pytest.raises(StorageError, match=rf"http://127\.0\.0\.1:{port} cannot be reached") as caught:
        ArtifactStore(nowhere).find(KEY)
    assert_two_lines(caught.value, exit_code=20)
    assert caught.value.is_transient


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key(settings: S3Settings, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv(variable, "WRONG")
    with pytest.raises(AuthError, match="refused the credentials") as caught:
        ArtifactStore(settings).check_conditional_writes()
    assert_two_lines(caught.value, exit_code=21)
    assert secret not in str(caught.value)


def test_no_key_at_all(settings: S3Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AuthError, match="no credentials") as caught:
        ArtifactStore(settings).find(KEY)
    assert_two_lines(caught.value, exit_code=21)


@pytest.mark.parametrize("bucket", ["not-there", "N_O"])
def test_a_bucket_that_does_not_exist(settings: S3Settings, directory: Path, bucket: str) -> None:
    store = ArtifactStore(settings.model_copy(update={"bucket": bucket}))
    for action in (lambda: commit(store, directory), lambda: list(store.list_artifacts())):
        with pytest.raises(BucketError, match=bucket) as caught:
            action()
        assert_two_lines(caught.value, exit_code=22)


# Servers that are not what they should be.


def test_a_server_that_ignores_conditions_is_refused(settings: S3Settings) -> None:
    with proxied(settings, without_conditions) as proxy:
        store = ArtifactStore(proxy.settings)
        pointer = Pointer(store, "x")
        pointer.swap(None, {"model": "a"})
        pointer.swap(None, {"model": "b"})  # what would happen without the check: nobody is refused
        with pytest.raises(ConditionalWriteError, match=proxy.settings.endpoint_url) as caught:
            store.check_conditional_writes()
    assert_two_lines(caught.value, exit_code=26)
    ArtifactStore(settings).check_conditional_writes()  # the real one is not


def test_a_server_that_does_not_know_conditions_is_refused(settings: S3Settings) -> None:
    def not_implemented(request: Request, forward: Forward) -> Answer:
        return refusal("NotImplemented", 501) if request.is_conditional else forward(request)

    with proxied(settings, not_implemented) as proxy, pytest.raises(ConditionalWriteError):
        ArtifactStore(proxy.settings).check_conditional_writes()


class Once:
    """Spoils the request of one number, once."""

    def __init__(self, number: int, answer: Answer | None = None, *, is_applied: bool = False) -> None:
        self.number, self.answer, self.is_applied = number, answer, is_applied

    def __call__(self, request: Request, forward: Forward) -> Answer:
        if request.number != self.number:
            return forward(request)
        if self.is_applied:
            forward(request)
        return self.answer or refusal("SlowDown", 503)


@pytest.mark.parametrize("is_applied", [False, True], ids=["before it is done", "after it was done"])
def test_one_request_fails_whichever_it_is(
    settings: S3Settings, directory: Path, tmp_path: Path, is_applied: bool
) -> None:
    """Also where the server did the work and only its answer was lost: nobody takes that for a race."""
    num_requests = 1
    number = 0
    while number < num_requests:
        mine = settings.model_copy(update={"prefix": f"{settings.prefix}/{number}-{is_applied}"})
        with proxied(mine, Once(number, is_applied=is_applied)) as proxy:
            store = ArtifactStore(proxy.settings)
            ref = commit(store, directory)
            assert store.find(KEY) == ref
            store.fetch(ref, tmp_path / str(number))
            num_requests = len(proxy.requests) - 1  # one was repeated
        assert {path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()} == FILES
        assert check(ArtifactStore(mine)).findings == ()
        number += 1
    # Look, write, read back each file; manifest, result; find: name, manifest, look; fetch: manifest, read.
    assert num_requests == 3 * 2 + 2 + 4 + 3


def test_a_server_that_only_fails(settings: S3Settings, directory: Path) -> None:
    with proxied(settings, lambda request, forward: refusal("SlowDown", 503)) as proxy:
        with pytest.raises(StorageError, match="answered 503 to 2 tries while looking at blobs/") as caught:
            commit(ArtifactStore(proxy.settings), directory)
        assert len(proxy.requests) == 2
    assert_two_lines(caught.value, exit_code=20)


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
def test_credentials_that_ended_are_not_tried_again(settings: S3Settings, directory: Path, code: str) -> None:
    with proxied(settings, lambda request, forward: refusal(code, 403)) as proxy:
        with pytest.raises(AuthError, match=code):
            Pointer(ArtifactStore(proxy.settings), "x").read()
        assert len(proxy.requests) == 1


def test_a_server_that_keeps_silent(settings: S3Settings) -> None:
    is_over = threading.Event()

    def keep_silent(request: Request, forward: Forward) -> Answer:
        is_over.wait(20)
        return forward(request)

    with proxied(settings, keep_silent) as proxy:
        impatient = proxy.settings.model_copy(update={"read_timeout_s": 0.2})
        with pytest.raises(StorageError, match="cannot be reached while reading"):
            ArtifactStore(impatient).find(KEY)
        is_over.set()


def cut(answer: Answer) -> Answer:
    return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2], len(answer.body))


def test_a_body_that_breaks_off_is_read_anew(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    ref = commit(ArtifactStore(settings), directory)
    seen: Counter[str] = Counter()

    def break_first(request: Request, forward: Forward) -> Answer:
        seen[request.path] += 1
        return cut(forward(request)) if seen[request.path] == 1 else forward(request)

    with proxied(settings, break_first) as proxy:
        out = ArtifactStore(proxy.settings).fetch(ref, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == FILES
    assert set(seen.values()) == {2}


def test_bodies_that_always_break_off(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    ref = commit(ArtifactStore(settings), directory)

    def always_cut(request: Request, forward: Forward) -> Answer:
        return cut(forward(request)) if "/blobs/" in request.path else forward(request)

    with (
        proxied(settings, always_cut) as proxy,
        pytest.raises(StorageError, match=rf"downloading \S+ of artifact {ref}"),
    ):
        ArtifactStore(proxy.settings).fetch(ref, tmp_path / "out")
    assert list(tmp_path.glob("out/*")) == []
    assert list(tmp_path.glob("out/.*")) == []


def flipped(answer: Answer) -> Answer:
    body = bytearray(answer.body)
    body[-1] ^= 1
    headers = {name: value for name, value in answer.headers.items() if "checksum" not in name.lower()}
    return Answer(answer.status, headers, bytes(body))


def test_a_bit_that_flips_on_the_way_is_noticed(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    ref = commit(ArtifactStore(settings), directory)

    def flip(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        return flipped(answer) if answer.body and "/blobs/" in request.path else answer

    with proxied(settings, flip) as proxy:
        store = ArtifactStore(proxy.settings, cache_directory=tmp_path / "cache")
        with pytest.raises(IntegrityError, match=rf"config\.json of artifact {ref}") as caught:
            store.fetch(ref, tmp_path / "out")
        assert_two_lines(caught.value, exit_code=23)
        with pytest.raises(IntegrityError, match="read back from the store is not what was written, twice"):
            commit(ArtifactStore(proxy.settings.model_copy(update={"prefix": "flipped"})), directory)
    assert list(ArtifactStore(settings.model_copy(update={"prefix": "flipped"})).list_artifacts()) == []


def test_a_checkpoint_of_which_a_part_was_lost(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    """The server dropped half of a file and says so honestly: the checkpoint before it is taken."""
    store = ArtifactStore(settings)
    checkpoints = Checkpoints(store, KEY)
    checkpoints.save(1, directory, {"at": 1})
    (directory / "weights.bin").write_bytes(b"other" * 1000)
    checkpoints.save(2, directory, {"at": 2})
    newest = next(each for each in store.objects.list(f"checkpoints/{KEY}/00000002/") if each.size_bytes == 5000)
    store.objects.put(newest.path, b"other" * 500)
    assert checkpoints.latest() == (1, {"at": 1})
    assert (checkpoints.fetch(1, tmp_path / "out") / "weights.bin").read_bytes() == FILES["weights.bin"]


# Kills.


def kill_at_request(settings: S3Settings, directory: Path, number: int) -> None:
    """Commit, and get SIGKILL before the request of a number."""
    store = ArtifactStore(settings)
    left = [number]

    def kill(**_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    store.client.meta.events.register("before-send.s3", kill)
    with Lease.acquire(store, KEY, owner="child") as lease:
        commit(store, directory, lease=lease)


def test_a_kill_before_any_request_of_a_commit(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    """Whoever is killed wherever: nothing or all is visible, and the next one finishes, to the same id."""
    reader = ArtifactStore(settings.model_copy(update={"prefix": f"{settings.prefix}/undisturbed"}))
    expected = commit(reader, directory)
    context = multiprocessing.get_context("fork")
    number = 0
    exit_code: int | None = -signal.SIGKILL
    visible = []
    while exit_code == -signal.SIGKILL:
        mine = settings.model_copy(update={"prefix": f"{settings.prefix}/{number}"})
        child = context.Process(target=kill_at_request, args=(mine, directory, number))
        child.start()
        child.join(30)
        exit_code = child.exitcode
        store = ArtifactStore(mine)
        found = store.find(KEY)
        assert found in (None, expected)
        visible.append(found is not None)
        assert check(store).num_errors == 0
        with Lease.acquire(store, KEY, owner="next") as lease:  # without waiting for anything
            assert commit(store, directory, lease=lease) == expected
        assert check(store).findings == ()
        store.fetch(expected, tmp_path / str(number))
        number += 1
    assert exit_code == 0
    # Lease read and written; three a file; lease, manifest, lease, result; here it is visible; release.
    assert visible == [False] * (2 + 6 + 4) + [True] * 2


def test_who_lost_the_lease_in_the_middle_commits_nothing(settings: S3Settings, directory: Path) -> None:
    """A process that stood still while another took over comes back with an older token."""
    store = ArtifactStore(settings)
    slow = Lease.acquire(store, KEY, owner="slow")
    fast = slow._holder.model_copy(update={"owner": "fast", "token": 2})
    store.objects.put(f"leases/{KEY}.json", fast.model_dump_json().encode())
    with pytest.raises(HeldError, match="lease of slow") as caught:
        commit(store, directory, lease=slow)
    assert_two_lines(caught.value, exit_code=75)
    assert list(store.list_artifacts()) == []
    with pytest.raises(HeldError):
        Checkpoints(store, KEY, lease=slow).save(1, directory, {})
    assert Checkpoints(store, KEY).latest() is None
    slow.release()


# Full disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("full", ["target", "cache"])
def test_a_full_disk(settings: S3Settings, directory: Path, tmp_path: Path, small_disk: Path, full: str) -> None:
    cache = small_disk / "cache" if full == "cache" else None
    target = small_disk / "out" if full == "target" else tmp_path / "out"
    store = ArtifactStore(settings, cache_directory=cache)
    ref = commit(store, directory)
    with pytest.raises(DiskFullError, match=rf"no room for weights\.bin of artifact {ref}.* 128,000 bytes") as caught:
        store.fetch(ref, target)
    assert_two_lines(caught.value, exit_code=24)
    assert [path for path in small_disk.rglob("*") if path.name.startswith(".download-")] == []
    # What did fit is whole, and with more room the same command goes on.
    assert (target / "config.json").read_bytes() == FILES["config.json"]
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert (store.fetch(ref, target) / "weights.bin").read_bytes() == FILES["weights.bin"]


def test_a_checkpoint_does_not_fit(settings: S3Settings, directory: Path, small_disk: Path) -> None:
    checkpoints = Checkpoints(ArtifactStore(settings), KEY)
    checkpoints.save(3, directory, {})
    with pytest.raises(DiskFullError, match=r"weights\.bin of checkpoint 3"):
        checkpoints.fetch(3, small_disk / "work")
    assert checkpoints.latest() == (3, {})
