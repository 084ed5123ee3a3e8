"""Interrupts that are not lost.

A signal's exception (Ctrl-C, or Prefect's for SIGTERM) is raised wherever the main thread happens to be. In a
destructor, a weak reference's callback or a type check inside pydantic's serializer, Python prints and forgets
it: a run that was told to end would go on. Imports no Prefect: the command line comes here before it has said
where Prefect's server is, and Prefect reads that once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_AGAIN_AFTER_S = 0.1
"""Seconds until a forgotten signal is sent again: long enough to have left what forgot it."""


@contextmanager
def lasting_interrupts() -> Iterator[None]:
    """While the block runs, send a signal to this process again when its exception was forgotten."""
    before = sys.unraisablehook

    def hook(forgotten: sys.UnraisableHookArgs) -> None:
        number = _signal_of(forgotten.exc_value)
        if number is None:
            before(forgotten)
        else:
            again = threading.Timer(_AGAIN_AFTER_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _signal_of(error: BaseException | None) -> int | None:
    """Return the signal whose exception this is, if it is one's."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    prefect = sys.modules.get("prefect.exceptions")  # where that was never imported, its exception was never raised
    if prefect is not None and isinstance(error, prefect.TerminationSignal):
        return int(error.signal)
    return None
