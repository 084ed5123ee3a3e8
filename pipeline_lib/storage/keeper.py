"""Keeps the embedded S3 server while anyone uses it. A script that imports the standard library alone.

Every user of the server holds a shared lock on one file, and the system frees it however the user
ends. The keeper waits for the exclusive lock: it gets it when the last user is gone, ends the
server, and holds the lock until the server is no more, so that whoever comes next starts a new one.
A second lock is held by keeper and server together: while either lives, no other server may start on
the same files.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Start the server given as the command line, and end it after its last user."""
    users_path, server_path, *command = sys.argv[1:]
    served = Path(server_path).open("r+")  # noqa: SIM115  (open as long as this process lives)
    fcntl.flock(served, fcntl.LOCK_EX | fcntl.LOCK_NB)
    served.truncate()
    served.write(f"{os.getpid()}\n")
    served.flush()
    libc: Any = ctypes.CDLL(None)  # before the fork: a child may not load libraries

    def die_with_keeper() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    server = subprocess.Popen(command, preexec_fn=die_with_keeper, pass_fds=[served.fileno()])
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    threading.Thread(target=_end_with, args=(server,), daemon=True).start()
    with Path(users_path).open("rb") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        server.terminate()
        try:
            server.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            server.kill()
        threading.Event().wait()  # until `_end_with` has seen the end


def _end_with(server: subprocess.Popen[bytes]) -> None:
    os._exit(abs(server.wait()))


if __name__ == "__main__":
    main()
