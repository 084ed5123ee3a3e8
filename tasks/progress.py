"""Progress bars on the terminal; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_EVERY_S = 10.0


class Bar:
    """One stage's bar."""

    def __init__(self, terminal: Terminal, name: str) -> None:
        self._terminal, self._name = terminal, name
        self._task: TaskID | None = terminal.add(name)
        self._last_line_s = time.monotonic()

    def move(self, fraction: float, text: str) -> None:
        """Show the share done and what is going on."""
        self._terminal.update(self._task, fraction, text)
        now = time.monotonic()
        if self._task is None and now - self._last_line_s >= _PLAIN_EVERY_S:
            self._last_line_s = now
            self._terminal.line(f"{self._name:<18} {100 * fraction:3.0f} %  {text}")

    def say(self, text: str) -> None:
        """Show a line without moving the bar."""
        self._terminal.update(self._task, None, text)

    def finish(self, text: str) -> None:
        """Fill the bar and stop its clock."""
        self._terminal.update(self._task, 1.0, text)
        if self._task is None:
            self._terminal.line(f"{self._name:<18} {text}")


class Terminal:
    """The bars of all stages that run in this process."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self.is_quiet = False

    def start(self) -> None:
        """Show bars where the error stream is a terminal."""
        console = Console(file=self._stream or sys.stderr)
        if console.is_terminal and not self.is_quiet:
            self._progress = Progress(
                TextColumn("{task.description:<18}"), BarColumn(bar_width=30), TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(), TextColumn("{task.fields[text]}", style="dim"), console=console,
            )  # fmt: skip
            self._progress.start()

    def stop(self) -> None:
        """Leave the bars as they are."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def bar(self, name: str) -> Bar:
        """Add a stage's bar."""
        return Bar(self, name)

    def add(self, name: str) -> TaskID | None:
        """Add a bar to the display, where there is one."""
        return None if self._progress is None else self._progress.add_task(name, total=1.0, text="")

    def update(self, task: TaskID | None, fraction: float | None, text: str) -> None:
        """Move a bar."""
        if self._progress is not None and task is not None:
            self._progress.update(task, completed=fraction, text=text[:60])

    def line(self, text: str) -> None:
        """Write a plain line."""
        if not self.is_quiet:
            with self._lock:
                stream = self._stream or sys.stderr
                try:
                    stream.write(text + "\n")
                    stream.flush()
                except BrokenPipeError:
                    self.is_quiet = True  # whoever read the lines has gone; the run goes on


console = Terminal()
"""The terminal of this process."""
