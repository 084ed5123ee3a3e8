"""Points at which a test may end the process as `kill -9` would, to prove that nothing is lost."""

from __future__ import annotations

import os
import signal

KILL_VARIABLE = "PREFLINE_KILL_AT"
"""`stage:point`, e.g. `sft:before_commit`; with `PREFLINE_KILL_TARGET=parent` the flow dies too."""


def kill_point(stage: str, point: str) -> None:
    """End this process here where the environment asks for it; otherwise do nothing."""
    if os.environ.get(KILL_VARIABLE) != f"{stage}:{point}":
        return
    if os.environ.get("PREFLINE_KILL_TARGET") == "parent":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
