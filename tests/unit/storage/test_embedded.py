"""The embedded server: started once, shared, ended after its last user, its files kept."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline_lib.errors import PortTakenError, StorageError
from pipeline_lib.storage import embedded as module
from pipeline_lib.storage.embedded import EmbeddedS3, free_port_pairs, hold
from pipeline_lib.storage.objects import Objects
from pipeline_lib.storage.s3 import S3Settings

pytestmark = pytest.mark.servers

END_S = 30
USER = """
import sys
from pathlib import Path
from pipeline_lib.storage.embedded import EmbeddedS3
server = EmbeddedS3(Path(sys.argv[1]))
print(server.start().endpoint_url, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new home; the environment comes back as it was, for the server of the session."""
    home = tmp_path / "home"
    home.mkdir()
    for name in EmbeddedS3(home).environment():
        monkeypatch.setenv(name, "")
    (home / "s3-keys.json").unlink()
    return home


def processes(home: Path) -> list[psutil.Process]:
    """Return the keeper and the server of a home."""
    keeper = psutil.Process(int((home / "s3-server.lock").read_text()))
    return [keeper, *keeper.children()]


def wait_for_end(found: list[psutil.Process]) -> None:
    assert len(found) == 2
    _, alive = psutil.wait_procs(found, timeout=END_S)
    assert alive == []


def wait_until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(END_S * 100):
        if is_so():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to be")


class User:
    """Another process that uses a home's server."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(module.__file__).parents[2],
        )  # fmt: skip

    def endpoint(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def users(home: Path) -> Iterator[Any]:
    started: list[User] = []

    def start() -> User:
        started.append(User(home))
        return started[-1]

    yield start
    for user in started:
        user.process.kill()
        user.process.communicate()


def test_keys_files_and_loopback(home: Path) -> None:
    server = EmbeddedS3(home)
    assert not server.is_running()
    settings = server.start()
    try:
        keys = home / "s3-keys.json"
        assert stat.S_IMODE(keys.stat().st_mode) == 0o600
        secret = json.loads(keys.read_text())["secret_key"]
        assert secret == os.environ["AWS_SECRET_ACCESS_KEY"]
        assert len(secret) >= 40
        assert "127.0.0.1" in os.environ["NO_PROXY"]
        Objects(settings).check_conditional_writes()
        _, weed = processes(home)
        listening = [each.laddr for each in weed.net_connections() if each.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        ports = json.loads((home / "s3-server.json").read_text())["ports"]
        assert {address.port for address in listening} <= {*ports, *(port + 10_000 for port in ports)}
        assert secret not in " ".join(weed.cmdline())
        assert secret not in (home / "logs" / "s3.log").read_text()
    finally:
        found = processes(home)
        server.stop()
    wait_for_end(found)
    assert not EmbeddedS3(home).is_running()


def test_objects_outlive_the_server_even_when_it_is_killed(home: Path) -> None:
    content = os.urandom(300_000)
    server = EmbeddedS3(home)
    settings = server.start()
    Objects(settings).put("a/b", content)
    found = processes(home)
    found[1].send_signal(signal.SIGKILL)
    wait_for_end(found)
    again = EmbeddedS3(home)
    try:
        settings = again.start()  # mostly at the same ports
        stored = Objects(settings).get("a/b")
        assert stored is not None
        assert stored.content == content
    finally:
        server.stop()
        again.stop()


def test_processes_share_one_server_until_the_last_is_gone(home: Path, users: Any) -> None:
    first, second = users(), users()
    endpoint = first.endpoint()
    assert endpoint.startswith("http://127.0.0.1:")
    assert second.endpoint() == endpoint
    found = processes(home)
    first.process.kill()
    first.process.wait()
    server = EmbeddedS3(home)
    assert server.start().endpoint_url == endpoint
    assert Objects(S3Settings(endpoint_url=endpoint)).head("x") is None
    assert processes(home) == found
    second.process.kill()
    second.process.wait()
    kept = hold(home)
    server.stop()
    wait_until(server.is_running)
    kept.close()
    wait_for_end(found)


def test_whoever_started_it_may_be_killed_before_it_answers(home: Path, users: Any) -> None:
    """The second waits for the first one's start, and takes over what the first leaves behind."""
    first = users()
    state = home / "s3-server.json"
    wait_until(lambda: state.exists() and (home / "s3-server.lock").read_text() != "")
    second = users()
    first.process.kill()
    assert second.endpoint() == json.loads(state.read_text())["endpoint"]


def test_the_server_does_not_outlive_its_keeper(home: Path) -> None:
    server = EmbeddedS3(home)
    server.start()
    found = processes(home)
    found[0].send_signal(signal.SIGKILL)
    wait_for_end(found)
    server.stop()


def test_ports_that_are_taken_by_now_are_replaced(home: Path) -> None:
    """The home remembers the ports of another server that is running now."""
    other = EmbeddedS3(home / "other")
    taken = other.start()
    state = json.loads((home / "other" / "s3-server.json").read_text())
    (home / "s3-server.json").write_text(json.dumps(state))
    server = EmbeddedS3(home)
    try:
        assert not server.is_running()  # it answers, but not to this home's keys
        assert server.start().endpoint_url != taken.endpoint_url
    finally:
        server.stop()
        other.stop()


def test_a_port_that_is_taken_again_and_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = EmbeddedS3(home / "other")
    taken = json.loads(_started(other).read_text())["ports"]
    monkeypatch.setattr(module, "free_port_pairs", lambda _: taken)
    server = EmbeddedS3(home)
    with pytest.raises(PortTakenError, match="was taken while it started") as caught:
        server.start()
    assert caught.value.exit_code == 25
    other.stop()


def _started(server: EmbeddedS3) -> Path:
    server.start()
    return server.home / "s3-server.json"


def test_a_server_that_cannot_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_weed", lambda: "/bin/false")
    with pytest.raises(StorageError, match="did not start: no output") as caught:
        EmbeddedS3(home).start()
    assert str(home / "logs" / "s3.log") in caught.value.next_step


def test_a_program_that_is_not_installed(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="`weed` is not installed") as caught:
        EmbeddedS3(home).start()
    assert "PREFLINE_S3_ENDPOINT" in caught.value.next_step


def test_free_ports_are_distinct() -> None:
    ports = free_port_pairs(10)
    assert len({*ports, *(port + 10_000 for port in ports)}) == 20
