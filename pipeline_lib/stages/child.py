"""A stage in a process of its own: starting it, hearing from it, ending it.

Children are forked from one server process that has imported the heavy libraries, so each starts
in a fraction of a second and its memory goes when it ends. A child tells its progress as JSON over
a pipe of its own; whatever libraries print goes to a log file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib import errors
from pipeline_lib.errors import ChildDiedError, MemoryLimitError, PipelineError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.lease import STARTER_VARIABLE
from pipeline_lib.training.job import main

if TYPE_CHECKING:
    from pipeline_lib.stages.contract import Events
    from pipeline_lib.stages.execute import Job

GRACE_S = 300.0
"""Seconds a child has to commit a checkpoint after SIGTERM: one of many gigabytes is uploaded and read back."""
_PRELOADED = ["pipeline_lib.training.preload"]
_LOG_TAIL_BYTES = 1500
_running: set[BaseProcess] = set()


def run_in_child(job: Job, *, key: str, events: Events) -> ArtifactRef:
    """Run a stage in a child process to its end.

    Whatever ends the waiting here (Ctrl-C, a cancelled flow) is passed on to the child, which then
    commits a checkpoint.

    Raises:
        PipelineError: As the child raised it; ChildDiedError where it ended without a word.
    """
    logs = job.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log_path = logs / f"{job.stage}-{key[:12]}.log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    here, there = context.Pipe(duplex=False)
    child = context.Process(
        target=main,
        args=(job.model_dump_json(), there, str(log_path), {**os.environ, STARTER_VARIABLE: str(os.getpid())}),
        name=f"prefline-{job.stage}",
    )
    try:
        child.start()
        there.close()
        _running.add(child)
        last = _listen(here, events)
        child.join()
    except BaseException:
        here.close()  # nobody reads any more: a child that waits for room in the pipe could commit nothing
        _end(child)
        raise
    finally:
        _running.discard(child)
    if "artifact" in last:
        return ArtifactRef.model_validate(last["artifact"])
    if "error" in last:
        raise _as_error(last["error"])
    raise _died(job.stage, child.exitcode or 0, log_path)


def end_children() -> None:
    """Ask every stage that runs in a child of this process to end; whoever waits for one hears that it was stopped."""
    for child in tuple(_running):
        child.terminate()


def _listen(pipe: Connection, events: Events) -> dict[str, Any]:
    """Pass a child's messages on until it closes its end; return the one that ends it."""
    last: dict[str, Any] = {}
    while True:
        try:
            message = json.loads(pipe.recv_bytes())
        except EOFError:
            return last
        match message["event"]:
            case "progress":
                events.progress(message["fraction"], message["text"])
            case "metrics":
                events.metrics(message["step"], message["values"])
            case "log":
                events.log(message["text"])
            case _:
                last = message


def _end(child: BaseProcess) -> None:
    """Ask a child to end, and end it after its grace."""
    if child.is_alive():
        child.terminate()
        child.join(GRACE_S)
        if child.is_alive():
            child.kill()
            child.join()


def _as_error(described: dict[str, str]) -> PipelineError:
    """Make the exception anew that a child described."""
    cls = getattr(errors, described["class"], PipelineError)
    error: PipelineError = cls(described["cause"], next_step=described["next_step"])
    return error


def _died(stage: str, code: int, log_path: Path) -> PipelineError:
    tail = log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", errors="replace").strip()
    last_line = tail.splitlines()[-1] if tail else "its log is empty"
    if code == -signal.SIGKILL:
        return MemoryLimitError(
            f"the process of stage {stage} was killed by signal 9, as the system does when memory runs out",
            next_step=f"lower {stage}.tokens_per_batch or batch_size, or free memory, and run the same "
            "command again: it goes on from the last checkpoint",
        )
    return ChildDiedError(
        f"the process of stage {stage} ended with code {code} and no result: {last_line}",
        next_step=f"read {log_path}; the same command goes on from the last checkpoint",
    )
