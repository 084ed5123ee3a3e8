"""What goes wrong with the store: one line of cause, one of what to do, an exit code, nothing half-written."""

from __future__ import annotations

import errno
import http.client
import http.server
import multiprocessing
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline_lib.errors import (
    AuthError,
    BucketError,
    ConditionalWriteError,
    ConflictError,
    DiskFullError,
    IntegrityError,
    PipelineError,
    StorageError,
)
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage import objects as objects_module
from pipeline_lib.storage.embedded import EmbeddedS3
from pipeline_lib.storage.fsck import check
from pipeline_lib.storage.pointer import Pointer
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

KEY = "ab" * 32


def commit(store: ArtifactStore, directory: Path, **files: bytes) -> ArtifactRef:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return store.commit(
        directory, kind="k", stage="s", stage_version=1, config={}, inputs={}, metrics={}, measurements={},
        stage_key=KEY,
    )  # fmt: skip


def assert_helps(error: PipelineError, *, exit_code: int) -> None:
    """Check that an error is two lines and tells no secret."""
    assert error.exit_code == exit_code
    assert re.fullmatch(r"E_[A-Z_]+: [^\n]+\n  next: [^\n]+", str(error))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(error)


class Proxied(http.server.BaseHTTPRequestHandler):
    """A proxy between client and server: what it does besides passing on is set on its class."""

    protocol_version = "HTTP/1.1"
    upstream: str
    ignored_condition: str | None = None
    """A condition that is answered with 200 whether it holds or not, as some servers do."""
    lose_answers: int = 0
    """Answers to conditional writes that are thrown away, with the connection."""
    cut_bodies: int = 0
    """Bodies that end after half of their bytes."""
    failures: int = 0
    """Requests that are answered with 503 SlowDown."""
    num_requests: int = 0

    def log_message(self, *_: object) -> None:
        pass

    def pass_on(self) -> None:
        rules = type(self)
        rules.num_requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if rules.failures > 0:
            rules.failures -= 1
            self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
            return
        if rules.ignored_condition is not None and rules.ignored_condition in self.headers:
            self.answer(200, b"", headers=[("ETag", '"0123"')])
            return
        connection = http.client.HTTPConnection(rules.upstream, timeout=30)
        connection.request(self.command, self.path, body=body, headers=dict(self.headers.items()))
        upstream = connection.getresponse()
        content = upstream.read()
        is_conditional = "if-match" in self.headers or "if-none-match" in self.headers
        if is_conditional and rules.lose_answers > 0:
            rules.lose_answers -= 1
            self.close_connection = True
            return
        cut = self.command == "GET" and rules.cut_bodies > 0 and len(content) > 1000
        if cut:
            rules.cut_bodies -= 1
            self.close_connection = True
        self.answer(upstream.status, content, cut=cut, headers=upstream.getheaders())
        connection.close()

    def answer(
        self, status: int, content: bytes, *, cut: bool = False, headers: list[tuple[str, str]] | None = None
    ) -> None:
        self.send_response_only(status)
        kept = [(name, value) for name, value in headers or [] if name.lower() not in ("content-length", "connection")]
        length = next((value for name, value in headers or [] if name.lower() == "content-length"), str(len(content)))
        for name, value in [*kept, ("Content-Length", length)]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on  # noqa: N815


@pytest.fixture
def proxy(settings: S3Settings) -> Iterator[tuple[S3Settings, type[Proxied]]]:
    """The server behind a proxy, and the proxy's rules."""
    assert settings.endpoint_url is not None

    class Rules(Proxied):
        upstream = settings.endpoint_url.removeprefix("http://")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rules)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{server.server_port}"}), Rules
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_without_conditional_writes_is_refused(proxy: tuple[S3Settings, type[Proxied]]) -> None:
    settings, rules = proxy
    for header in ("if-none-match", "if-match"):
        rules.ignored_condition = header
        with pytest.raises(ConditionalWriteError, match=re.escape(str(settings.endpoint_url))) as caught:
            ArtifactStore(settings).check_conditional_writes()
        assert_helps(caught.value, exit_code=26)
    rules.ignored_condition = None
    store = ArtifactStore(settings)
    store.check_conditional_writes()
    assert list(store.objects.list("probes/")) == []
    before = rules.num_requests
    ArtifactStore(settings).check_conditional_writes()  # what was found out is remembered
    assert rules.num_requests == before


def test_an_answer_that_got_lost_is_no_conflict(proxy: tuple[S3Settings, type[Proxied]]) -> None:
    """The write was made; its repetition is refused by its own first success."""
    settings, rules = proxy
    pointer = Pointer(ArtifactStore(settings), "p")
    rules.lose_answers = 1
    first = pointer.swap(None, {"n": 1})
    assert pointer.read() == ({"n": 1}, first)
    rules.lose_answers = 1
    second = pointer.swap(first, {"n": 2})
    assert rules.lose_answers == 0
    assert pointer.read() == ({"n": 2}, second)
    with pytest.raises(ConflictError):
        pointer.swap(first, {"n": 2})  # by another process: no answer was lost


def test_a_body_that_breaks_off_is_read_again(proxy: tuple[S3Settings, type[Proxied]], tmp_path: Path) -> None:
    settings, rules = proxy
    store = ArtifactStore(settings)
    content = os.urandom(50_000)
    ref = commit(store, tmp_path / "in", big=content)
    rules.cut_bodies = 2
    assert (store.fetch(ref, tmp_path / "out") / "big").read_bytes() == content
    assert rules.cut_bodies == 0
    rules.cut_bodies = 3
    with pytest.raises(StorageError, match=f"while downloading big of artifact {ref}") as caught:
        store.fetch(ref, tmp_path / "out2")
    assert_helps(caught.value, exit_code=20)
    assert list((tmp_path / "out2").iterdir()) == []


def test_a_slow_server_is_asked_again_a_bounded_number_of_times(proxy: tuple[S3Settings, type[Proxied]]) -> None:
    settings, rules = proxy
    store = ArtifactStore(settings)
    rules.failures = 1
    store.objects.put("a", b"1")
    rules.failures, rules.num_requests = 100, 0
    with pytest.raises(StorageError, match="answered SlowDown to 2 tries while writing a") as caught:
        store.objects.put("a", b"2")
    assert rules.num_requests == settings.max_attempts == 2
    assert_helps(caught.value, exit_code=20)


# The server cannot be used.


def test_nobody_there(settings: S3Settings) -> None:
    nobody = settings.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StorageError, match=r"http://127\.0\.0\.1:9 cannot be reached") as caught:
        ArtifactStore(nobody).check_conditional_writes()
    assert_helps(caught.value, exit_code=20)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key(settings: S3Settings, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wrongwrongwrong")
    store = ArtifactStore(settings.model_copy(update={"bucket": "other"}))
    for ask in (store.check_conditional_writes, lambda: store.find(KEY), lambda: list(store.objects.list(""))):
        with pytest.raises(AuthError, match="refused the credentials") as caught:
            ask()
        assert_helps(caught.value, exit_code=21)


def test_no_keys_at_all(settings: S3Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AuthError, match="no credentials") as caught:
        ArtifactStore(settings).find(KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert_helps(caught.value, exit_code=21)


def test_no_such_bucket(settings: S3Settings, tmp_path: Path) -> None:
    store = ArtifactStore(settings.model_copy(update={"bucket": "absent"}))
    for ask in (store.check_conditional_writes, lambda: store.find(KEY), lambda: commit(store, tmp_path, a=b"1")):
        with pytest.raises(BucketError, match="the bucket 'absent' does not exist") as caught:
            ask()
        assert_helps(caught.value, exit_code=22)


def test_a_name_that_no_bucket_can_have(settings: S3Settings) -> None:
    with pytest.raises(BucketError, match="'a b' cannot be a bucket") as caught:
        ArtifactStore(settings.model_copy(update={"bucket": "a b"})).check_conditional_writes()
    assert_helps(caught.value, exit_code=22)


# The disk is full.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(settings: S3Settings, tmp_path: Path, small_disk: Path) -> None:
    ref = commit(ArtifactStore(settings), tmp_path / "in", big=os.urandom(3 << 20))
    for store in (ArtifactStore(settings), ArtifactStore(settings, cache_directory=small_disk / "cache")):
        with pytest.raises(DiskFullError, match=rf"no room for big of artifact {ref} .* 3,145,728 bytes") as caught:
            store.fetch(ref, small_disk / "out")
        assert_helps(caught.value, exit_code=24)
        assert [path for path in small_disk.rglob("*") if path.is_file()] == []
    # The cache has room, the place where the file is wanted has not.
    roomy = ArtifactStore(settings, cache_directory=tmp_path / "cache")
    with pytest.raises(DiskFullError, match="no room for big"):
        roomy.fetch(ref, small_disk / "out")
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_it_is_synced(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    ref = commit(store, tmp_path / "in", a=b"1")

    def full(_: int) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(objects_module.os, "fsync", full)
    with pytest.raises(DiskFullError, match="no room for a of artifact") as caught:
        store.fetch(ref, tmp_path / "out")
    monkeypatch.undo()
    assert caught.value.exit_code == 24
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    assert (store.fetch(ref, tmp_path / "out") / "a").read_bytes() == b"1"


# A commit is killed.


def commit_and_die(settings: S3Settings, directory: Path, at: int) -> None:
    """Commit, and die before the given request."""
    store = ArtifactStore(settings)
    seen = 0

    def count(**_: Any) -> None:
        nonlocal seen
        if seen == at:
            os.kill(os.getpid(), 9)
        seen += 1

    store.client.meta.events.register("before-send.s3", count)
    commit(store, directory, a=b"1", b=b"22")


def test_a_commit_killed_before_any_of_its_requests(settings: S3Settings, tmp_path: Path) -> None:
    """A reader sees nothing, or everything; the same commit again gives the same artifact."""
    context = multiprocessing.get_context("fork")
    expected = commit(ArtifactStore(settings), tmp_path / "in", a=b"1", b=b"22")
    visible = []
    for at in range(20):
        mine = settings.model_copy(update={"prefix": f"{settings.prefix}/{at}"})
        child = context.Process(target=commit_and_die, args=(mine, tmp_path / "in", at))
        child.start()
        child.join()
        store = ArtifactStore(mine)
        found = store.find(KEY)
        visible.append(found is not None)
        assert found in (None, expected)
        for ref in store.list_artifacts():
            assert {p.name: p.read_bytes() for p in store.fetch(ref, tmp_path / f"{at}").iterdir()} == {
                "a": b"1", "b": b"22",
            }  # fmt: skip
        assert commit(store, tmp_path / "in", a=b"1", b=b"22") == expected
        assert store.find(KEY) == expected
        if child.exitcode == 0:
            break
    # Two files: looked for, written and read back; the manifest; the name. Then nothing is left to kill.
    assert visible == [False] * 8 + [True]


def test_what_is_read_back_is_not_what_was_written(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_module.Objects, "sha256_of", lambda *_: "0" * 64)
    with pytest.raises(IntegrityError, match="a read back from the store is not what was written, twice") as caught:
        commit(store, tmp_path / "in", a=b"1")
    assert_helps(caught.value, exit_code=23)
    assert store.find(KEY) is None
    assert list(store.list_artifacts()) == []


@pytest.mark.slow  # the server itself tries for a quarter of a minute
def test_a_bit_that_flips_on_the_servers_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server refuses to hand out what its own checksum denies; the check names the file."""
    home = tmp_path / "home"
    home.mkdir()
    for name in EmbeddedS3(home).environment():
        monkeypatch.setenv(name, "")
    server = EmbeddedS3(home)
    settings = server.start().model_copy(update={"max_attempts": 1})
    content = os.urandom(5000)
    ref = commit(ArtifactStore(settings), tmp_path / "in", weights=content, other=b"sound")
    ended = psutil.Process(int((home / "s3-server.lock").read_text()))
    server.stop()
    ended.wait(30)
    for volume in (home / "s3").glob("*.dat"):
        stored = bytearray(volume.read_bytes())
        place = stored.find(content)
        if place >= 0:
            stored[place + 2000] ^= 1
            volume.write_bytes(stored)
    try:
        settings = server.start().model_copy(update={"max_attempts": 1})
        store = ArtifactStore(settings)
        assert store.open_bytes(ref, "other") == b"sound"
        report = check(store, repair=True)
        assert [(finding.severity, finding.subject) for finding in report.findings] == [
            ("repaired", f"stage {KEY[:12]}"), ("warning", f"artifact {ref}"),
        ]  # fmt: skip
        assert "weights cannot be read" in report.in_words()
        assert store.find(KEY) is None
        assert commit(store, tmp_path / "in", weights=content, other=b"sound") == ref
        assert check(store).findings == ()
    finally:
        server.stop()
