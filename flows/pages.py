"""MLflow's pages for `prefline up`, and the variables by which other programs find the servers."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline_lib.errors import ConfigError
from pipeline_lib.processes import die_with_parent
from pipeline_lib.storage.embedded import EmbeddedS3
from pipeline_lib.tracking import TrackingSettings


@contextmanager
def mlflow_pages(settings: TrackingSettings, home: Path, *, port: int) -> Iterator[str]:
    """Serve MLflow's pages for the embedded tracking database; a named server has its own."""
    if not settings.uri.startswith("sqlite:"):
        yield settings.uri
        return
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", settings.uri, "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    if settings.artifact_root is not None:
        command += ["--artifacts-destination", settings.artifact_root]
    # Its job workers have no use here; what it does start is a group of its own and ends as one.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "logs" / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes], *, grace_s: float = 20.0) -> None:
    """Ask a process and all that it started to end, and end what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)


def environment_of(home: Path) -> dict[str, str]:
    """Return what `prefline up` set up, as variables; values are quoted for a shell.

    Raises:
        ConfigError: No servers of this home are running.
    """
    embedded = EmbeddedS3(home.absolute())
    state = home / "prefect" / "server.json"
    if not embedded.is_running() or not state.is_file():
        raise ConfigError(f"no servers of {home} are running", next_step="start them in another terminal: prefline up")
    values = {
        **embedded.environment(),
        "PREFECT_API_URL": json.loads(state.read_text())["api_url"],
        "MLFLOW_TRACKING_URI": f"sqlite:///{home.absolute() / 'mlflow.db'}",
    }
    return {key: shlex.quote(value) for key, value in values.items()}
