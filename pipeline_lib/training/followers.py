"""The further processes of a stage that trains in several: started, watched and ended by its first.

The first process is the stage's child: it alone holds the lease, commits checkpoints and writes the
result. The others run the same stage on the same inputs, take their share of every step's forwards,
and are told apart by torch's variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import cast

from pipeline_lib.processes import die_with_parent, free_port


@contextmanager
def followers(job_json: str, size: int, *, on_death: Callable[[int, int], None]) -> Iterator[None]:
    """Keep `size - 1` further processes while the block runs, and make this one the first.

    Args:
        job_json: The job, as the first process has it.
        size: All processes, the first included.
        on_death: Called with rank and exit code where one ends with an error, from another thread.
    """
    if size == 1:
        yield
        return
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("spawn")
    group = [
        context.Process(target=_follow, args=(job_json, {**variables, "RANK": str(rank)}), daemon=True)
        for rank in range(1, size)
    ]
    for process in group:
        process.start()
    os.environ.update({**variables, "RANK": "0"})
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(group, is_over, on_death), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        for process in group:
            process.kill()  # they hold nothing that must be written
            process.join()


def _watch(group: list[BaseProcess], is_over: threading.Event, on_death: Callable[[int, int], None]) -> None:
    alive = {process.sentinel: (rank, process) for rank, process in enumerate(group, start=1)}
    while alive and not is_over.is_set():
        for sentinel in wait(list(alive), timeout=1.0):
            rank, process = alive.pop(cast(int, sentinel))
            process.join()
            if process.exitcode and not is_over.is_set():
                on_death(rank, process.exitcode)


def _follow(job_json: str, variables: dict[str, str]) -> None:
    # Ctrl-C reaches the whole terminal, other signals a whole group; only the first process decides when to stop,
    # and what it has not committed would be lost with a process that it waits for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    os.environ.update(variables)
    # Resolved by name: stages stand above training, and no import may point upward.
    importlib.import_module("pipeline_lib.stages.execute").follow(job_json)
