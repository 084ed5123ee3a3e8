"""Two processes of a gloo group, forked from a server that has imported the heavy libraries once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from pipeline_lib.processes import free_port

SIZE = 2
_PRELOADED = ["pipeline_lib.training.preload"]
"""What the product's own server of child processes has imported: one server does for both."""


def run_together(target: Callable[..., None], *arguments: Any) -> None:
    """Run `target(rank, *arguments)` in every process of a group, to their ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = free_port()
    group = [context.Process(target=_take_part, args=(rank, port, target, arguments)) for rank in range(SIZE)]
    for process in group:
        process.start()
    for process in group:
        process.join(300)
        if process.exitcode != 0:
            for other in group:
                other.kill()
        assert process.exitcode == 0


def _take_part(rank: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    torch.set_num_threads(1)
    target(rank, *arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()
