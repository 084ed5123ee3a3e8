"""Processes of this machine: one ends with whoever it works for; a port that a server can have."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Loaded here: between fork and exec a child may not load libraries."""


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the system for a signal when the parent's thread that started this process ends; may be a `preexec_fn`."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def end_with_starter() -> None:
    """Send SIGTERM to this process of multiprocessing when the process that asked for it ends.

    For a child of the fork server that is not its parent: the fork server lives as long as any of its children.
    """
    starter = multiprocessing.parent_process()
    if starter is None:
        return

    def wait() -> None:
        starter.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="end-with-starter", daemon=True).start()


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
