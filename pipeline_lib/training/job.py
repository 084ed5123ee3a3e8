"""The child process of a stage.

It ends with the flow that asked for it (by SIGTERM, so that it commits a checkpoint), tells its progress over
the pipe it is given, and names its error there instead of printing a stack trace.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline_lib.errors import ChildDiedError, DivergedError, MemoryLimitError, PipelineError
from pipeline_lib.processes import end_with_starter
from pipeline_lib.training.followers import followers

_PROGRESS_EVERY_S = 0.2


class PipeEvents:
    """Sends events as JSON; a closed pipe (the parent is gone) is not an error here."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock, self._last_progress_s = pipe, threading.Lock(), 0.0

    def send(self, **message: object) -> None:
        """Send one message."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._pipe.send_bytes(json.dumps(message).encode())

    def progress(self, fraction: float, text: str) -> None:
        """Tell progress, a few times a second at most."""
        now = time.monotonic()
        if fraction >= 1.0 or now - self._last_progress_s >= _PROGRESS_EVERY_S:
            self._last_progress_s = now
            self.send(event="progress", fraction=fraction, text=text)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Tell figures of a step."""
        self.send(event="metrics", step=step, values=dict(values))

    def log(self, text: str) -> None:
        """Tell one line."""
        self.send(event="log", text=text)


class StopRequest:
    """Remembers that the process was asked to end; a second signal changes nothing."""

    def __init__(self) -> None:
        # No Event: a second signal while the first one's handler holds its lock would wait for ever.
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:  # noqa: ARG002
        self._requested = True

    def __call__(self) -> bool:
        """Tell whether a signal came."""
        return self._requested


def main(job_json: str, pipe: Connection, log_path: str, environment: dict[str, str]) -> None:
    """Run one job and end the process with the error's exit code.

    Args:
        job_json: The job (`stages.execute.Job`).
        pipe: Where events go; the last one names the artifact or the error.
        log_path: File that standard output and error are appended to.
        environment: The starter's environment: the server process may have been forked before keys
            and addresses were in it.
    """
    should_stop = StopRequest()
    end_with_starter()
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    events = PipeEvents(pipe)
    try:
        artifact = _run(job_json, events, should_stop)
    except PipelineError as error:
        cause = error.cause
        if isinstance(error, DivergedError) and error.row_ids:
            rows = Path(log_path).with_suffix(".rows.json")
            rows.write_text(json.dumps({"cause": cause, "row_ids": error.row_ids}, indent=1))
            cause = f"{cause} (all {len(error.row_ids)} in {rows})"
        events.send(event="error", error=_described(type(error).__name__, cause, error.next_step))
        raise SystemExit(error.exit_code) from None
    except MemoryError:
        cause = "the stage needs more memory than the machine gives"
        events.send(event="error", error=_described("MemoryLimitError", cause, "lower tokens_per_batch or batch_size"))
        raise SystemExit(MemoryLimitError.exit_code) from None
    events.send(event="done", artifact=artifact)


def _described(name: str, cause: str, next_step: str) -> dict[str, str]:
    return {"class": name, "cause": cause, "next_step": next_step}


def _run(text: str, events: PipeEvents, should_stop: StopRequest) -> dict[str, Any]:
    # Resolved by name: stages stand above training, and no import may point upward.
    execute = importlib.import_module("pipeline_lib.stages.execute")
    job = execute.Job.model_validate_json(text)
    execute.use_threads(job)
    store = importlib.import_module("pipeline_lib.storage.store").ArtifactStore(
        job.storage, cache_directory=Path(job.home) / "cache"
    )

    def on_death(rank: int, code: int) -> None:
        # The others wait for it in a sum that never comes: end here, the newest checkpoint is committed.
        cause = f"process {rank} of stage {job.stage}'s {job.processes} ended with code {code}"
        next_step = "read the stage's log; the same command goes on from the last checkpoint"
        events.send(event="error", error=_described("ChildDiedError", cause, next_step))
        os._exit(ChildDiedError.exit_code)

    with followers(text, job.processes, on_death=on_death):
        ref = execute.run_here(job, store=store, events=events, should_stop=should_stop)
    dumped: dict[str, Any] = ref.model_dump()
    return dumped
