"""Points at which a test may end the process as `kill -9` would, to prove that nothing is lost."""

from __future__ import annotations

import os
import signal

from pipeline_lib.storage.lease import STARTER_VARIABLE

KILL_VARIABLE = "PREFLINE_KILL_AT"
"""`stage:point`, e.g. `sft:before_commit` or `ppo:step-3`."""
FLOW_VARIABLE = "PREFLINE_KILL_FLOW"
"""Set: the flow dies first, as when a machine goes down."""


def kill_point(stage: str, point: str) -> None:
    """End this process here where the environment asks for it; otherwise do nothing."""
    if os.environ.get(KILL_VARIABLE) != f"{stage}:{point}":
        return
    if FLOW_VARIABLE in os.environ:
        os.kill(int(os.environ[STARTER_VARIABLE]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
