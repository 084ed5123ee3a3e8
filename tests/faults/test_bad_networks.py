"""Each request of a commit failing in turn, silence, cut and flipped bodies, between the store and a real server."""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore import retryhandler

from pipeline_lib.errors import AuthError, ConditionalWriteError, HeldError, IntegrityError, StorageError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.fsck import check
from pipeline_lib.storage.lease import Lease
from pipeline_lib.storage.pointer import Pointer
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

KEY = "ab" * 32
FILES = {"config.json": b'{"a": 1}', "weights.bin": bytes(range(256)) * 500}


@dataclass(frozen=True)
class Request:
    """What the client sent."""

    number: int
    """Counts from 0."""
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What the client gets."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    num_promised_bytes: int | None = None
    """Content-Length, where it is not the body's."""


Forward = Callable[[Request], Answer]
Fault = Callable[[Request, Forward], Answer]
"""Answers a request, with the real server's help or without."""


def refusal(code: str, status: int) -> Answer:
    """Return an error as S3 words it."""
    return Answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


@dataclass
class Proxy:
    """A running proxy."""

    settings: S3Settings
    """The store, seen through the proxy."""
    upstream: str
    fault: Fault
    requests: list[Request] = field(default_factory=list)

    def forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()


@contextmanager
def proxied(settings: S3Settings, fault: Fault) -> Iterator[Proxy]:
    """Run a proxy with a fault before the server of these settings."""
    assert settings.endpoint_url is not None
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            with lock:
                request = Request(len(proxy.requests), self.command, self.path, headers, body)
                proxy.requests.append(request)
            answer = proxy.fault(request, proxy.forward)
            given = {name.lower(): value for name, value in answer.headers.items()}
            is_head = self.command == "HEAD"
            promised = len(answer.body) if answer.num_promised_bytes is None else answer.num_promised_bytes
            self.send_response_only(answer.status)
            for name, value in given.items():
                if name not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", given.get("content-length", "0") if is_head else str(promised))
            self.end_headers()
            if not is_head:
                self.wfile.write(answer.body)
            self.close_connection = promised != len(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815  (the names that the server looks up)

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client did not wait for the answer
                super().handle()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    through = settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{server.server_port}"})
    proxy = Proxy(through, urllib.parse.urlsplit(settings.endpoint_url).netloc, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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


def commit(store: ArtifactStore, directory: Path, *, lease: Lease | None = None) -> ArtifactRef:
    return store.commit(
        directory, kind="model", stage="sft", stage_version=1, config={}, inputs={}, metrics={}, measurements={},
        stage_key=KEY, lease=lease,
    )  # fmt: skip


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("is_done", [False, True], ids=["before it is done", "after it was done"])
def test_any_one_request_fails(settings: S3Settings, directory: Path, tmp_path: Path, is_done: bool) -> None:
    """Also where the server did the work and only its answer was lost: nobody takes that for a race."""
    number, num_requests = 0, 1
    while number < num_requests:
        mine = settings.model_copy(update={"prefix": f"{settings.prefix}/{number}"})

        def fail_one(request: Request, forward: Forward, number: int = number) -> Answer:
            if request.number != number:
                return forward(request)
            if is_done:
                forward(request)
            return refusal("SlowDown", 503)

        with proxied(mine, fail_one) as proxy:
            store = ArtifactStore(proxy.settings)
            with Lease.acquire(store, KEY, owner="test") as lease:
                ref = commit(store, directory, lease=lease)
            assert store.find(KEY) == ref
            store.fetch(ref, tmp_path / str(number))
            num_requests = len(proxy.requests) - 1  # one was repeated
        assert files_of(tmp_path / str(number)) == FILES
        assert check(ArtifactStore(mine)).findings == ()
        number += 1
    # Lease: read, written, asked for twice, released. Files: looked for, written, read back. Manifest and name.
    # Found: name, manifest, two files. Fetched: manifest, two files.
    assert num_requests == 5 + 2 * 3 + 2 + 4 + 3


def test_a_server_that_only_fails(settings: S3Settings, directory: Path) -> None:
    with proxied(settings, lambda request, forward: refusal("SlowDown", 503)) as proxy:
        with pytest.raises(StorageError, match=r"answered 503 to 2 tries while looking at blobs/") as caught:
            commit(ArtifactStore(proxy.settings), directory)
        assert len(proxy.requests) == 2
    assert caught.value.is_transient


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
def test_credentials_that_ended_are_not_tried_again(settings: S3Settings, code: str) -> None:
    with proxied(settings, lambda request, forward: refusal(code, 403)) as proxy:
        with pytest.raises(AuthError, match=code):
            Pointer(ArtifactStore(proxy.settings), "x").read()
        assert len(proxy.requests) == 1


def test_a_server_that_does_not_know_conditions(settings: S3Settings) -> None:
    def not_implemented(request: Request, forward: Forward) -> Answer:
        is_conditional = any(name.lower() in ("if-match", "if-none-match") for name in request.headers)
        return refusal("NotImplemented", 501) if is_conditional else forward(request)

    with (
        proxied(settings, not_implemented) as proxy,
        pytest.raises(ConditionalWriteError, match=proxy.settings.endpoint_url),
    ):
        ArtifactStore(proxy.settings).check_conditional_writes()


def test_a_server_that_keeps_silent(settings: S3Settings) -> None:
    is_over = threading.Event()

    def keep_silent(request: Request, forward: Forward) -> Answer:
        is_over.wait(20)
        return refusal("InternalError", 500)

    with proxied(settings, keep_silent) as proxy:
        impatient = proxy.settings.model_copy(update={"read_timeout_s": 0.2})
        with pytest.raises(StorageError, match="cannot be reached while reading"):
            ArtifactStore(impatient).find(KEY)
        is_over.set()


def test_bodies_that_always_break_off(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    ref = commit(ArtifactStore(settings), directory)

    def cut(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        if "/blobs/" not in request.path:
            return answer
        return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2], len(answer.body))

    with (
        proxied(settings, cut) as proxy,
        pytest.raises(StorageError, match=rf"downloading \S+ of artifact {ref}"),
    ):
        ArtifactStore(proxy.settings).fetch(ref, tmp_path / "out")
    assert files_of(tmp_path / "out") == {}


def test_a_bit_that_flips_on_the_way(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    """Neither is it taken for the file, nor does a commit believe in what it reads back."""
    ref = commit(ArtifactStore(settings), directory)

    def flip(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        if not answer.body or "/blobs/" not in request.path:
            return answer
        kept = {name: value for name, value in answer.headers.items() if "checksum" not in name.lower()}
        return Answer(answer.status, kept, answer.body[:-1] + bytes([answer.body[-1] ^ 1]))

    with proxied(settings, flip) as proxy:
        store = ArtifactStore(proxy.settings, cache_directory=tmp_path / "cache")
        with pytest.raises(IntegrityError, match=rf"config\.json of artifact {ref}"):
            store.fetch(ref, tmp_path / "out")
        new = proxy.settings.model_copy(update={"prefix": f"{settings.prefix}/new"})
        with pytest.raises(IntegrityError, match="read back from the store is not what was written, twice"):
            commit(ArtifactStore(new), directory)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    assert list(ArtifactStore(settings.model_copy(update={"prefix": new.prefix})).list_artifacts()) == []


def test_a_checkpoint_of_which_half_a_file_is_left(settings: S3Settings, directory: Path, tmp_path: Path) -> None:
    store = ArtifactStore(settings)
    checkpoints = Checkpoints(store, KEY)
    checkpoints.save(1, directory, {"at": 1})
    (directory / "weights.bin").write_bytes(b"other" * 1000)
    checkpoints.save(2, directory, {"at": 2})
    weights = next(each for each in store.objects.list(f"checkpoints/{KEY}/00000002/") if each.size_bytes == 5000)
    store.objects.put(weights.path, b"other" * 500)
    assert checkpoints.latest() == (1, {"at": 1})
    assert files_of(checkpoints.fetch(1, tmp_path / "out")) == FILES


def test_who_lost_the_lease_commits_nothing(settings: S3Settings, directory: Path) -> None:
    """A process that stood still while another took over comes back with an older token."""
    store = ArtifactStore(settings)
    slow = Lease.acquire(store, KEY, owner="slow")
    fast = slow._holder.model_copy(update={"owner": "fast", "token": 2})
    store.objects.put(f"leases/{KEY}.json", fast.model_dump_json().encode())
    with pytest.raises(HeldError, match="lease of slow"):
        commit(store, directory, lease=slow)
    assert list(store.list_artifacts()) == []
    with pytest.raises(HeldError):
        Checkpoints(store, KEY, lease=slow).save(1, directory, {})
    assert Checkpoints(store, KEY).latest() is None
    slow.release()
