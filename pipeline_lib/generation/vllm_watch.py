"""Ends vLLM's processes when the process that started them is gone, however it ended. A script of its own.

vLLM's engine does not notice that its parent was killed: it would keep the memory of its device for ever.
"""

from __future__ import annotations

import contextlib
import sys

import psutil


def main() -> None:
    """Wait until standard input ends, which the starter holds open; then end the processes of the command line."""
    engines = []
    for number in sys.argv[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            engines.append(psutil.Process(int(number)))
    sys.stdin.buffer.read()
    for engine in engines:
        for process in [*_children(engine), engine]:
            # A number that another process has by now is no longer ours: psutil says so.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _children(engine: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = engine.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


if __name__ == "__main__":
    main()
