"""Prefect with its own local API and SQLite under `.prefline/`, where no server is named.

Prefect reads its settings when it is imported, so this runs before the first import of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline_lib.errors import PrefectUnavailableError
from pipeline_lib.processes import die_with_parent, free_port
from pipeline_lib.storage.embedded import locked

API_VARIABLE = "PREFECT_API_URL"
START_DEADLINE_S = 90.0
BUSY_S = 20.0
"""How long a server whose process is there may take to answer."""


def is_healthy(api_url: str, *, timeout_s: float = 2.0) -> bool:
    """Tell whether a Prefect API answers."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=timeout_s) as answer:  # noqa: S310  (our own URL)
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def prefect_api(home: Path, *, port: int | None = None) -> Iterator[str]:
    """Make sure that a Prefect API answers, and tell Prefect its address by the environment.

    A server named by PREFECT_API_URL is used; else one of this home that is running; else one is
    started, and stopped at the end.

    Args:
        home: Folder of the embedded servers.
        port: Port of a server that is started; any free one by default.

    Raises:
        PrefectUnavailableError: The named server does not answer, or the embedded one did not start.
    """
    named = os.environ.get(API_VARIABLE)
    if named is not None:
        if not is_healthy(named.rstrip("/"), timeout_s=10):
            raise PrefectUnavailableError(
                f"no Prefect server answers at {API_VARIABLE}={named}",
                next_step="start it, correct the address, or unset the variable for the embedded server",
            )
        yield named
        return
    prefect_home = home.absolute() / "prefect"
    prefect_home.mkdir(parents=True, exist_ok=True)
    os.environ.update(_settings(prefect_home))
    state = prefect_home / "server.json"
    with locked(prefect_home / "start.lock"):  # of two commands that begin together one starts it
        api_url = _running(state)
        process = None
        if api_url is None:
            process, api_url = _start(home, port)
            temporary = state.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps({"api_url": api_url, "pid": process.pid}))
            temporary.replace(state)
    os.environ[API_VARIABLE] = api_url
    if process is None:
        yield api_url
        return
    try:
        yield api_url
    finally:
        os.environ.pop(API_VARIABLE, None)
        if _recorded(state).get("pid") == process.pid:
            state.unlink(missing_ok=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _settings(prefect_home: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def pages_of(api_url: str) -> dict[str, str]:
    """Return the setting by which a server's pages ask that server, whatever its port, and not the usual address."""
    return {"PREFECT_SERVER_UI_API_URL": api_url}


def _running(state: Path) -> str | None:
    """Return the address of this home's server; one that is busy is asked for a while, one that is gone is not."""
    recorded = _recorded(state)
    if not recorded:
        return None
    deadline, pause = time.monotonic() + BUSY_S, threading.Event()
    while not is_healthy(recorded["api_url"]):
        if not psutil.pid_exists(recorded["pid"]) or time.monotonic() > deadline:
            return None
        pause.wait(0.1)
    api_url: str = recorded["api_url"]
    return api_url


def _recorded(state: Path) -> dict[str, Any]:
    """Return what is written of a running server: `api_url` and `pid`; empty where nothing is."""
    try:
        recorded = json.loads(state.read_text())
        return {"api_url": str(recorded["api_url"]), "pid": int(recorded["pid"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _start(home: Path, port: int | None) -> tuple[subprocess.Popen[bytes], str]:
    chosen = port or free_port()
    logs = home.absolute() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log_path = logs / "prefect.log"
    api_url = f"http://127.0.0.1:{chosen}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(chosen)]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **pages_of(api_url)}, preexec_fn=die_with_parent,
        )  # fmt: skip
    deadline, pause = time.monotonic() + START_DEADLINE_S, threading.Event()
    while not is_healthy(api_url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            tail = log_path.read_bytes()[-300:].decode(errors="replace").strip().splitlines()
            raise PrefectUnavailableError(
                f"the embedded Prefect server did not start: {tail[-1] if tail else 'no output'}",
                next_step=f"read {log_path}; if another program took port {chosen}, run again",
            )
        pause.wait(0.1)
    return process, api_url
