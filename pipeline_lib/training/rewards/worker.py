"""The process that reward functions run in; it knows nothing but the standard library.

It reads a job as JSON from standard input and answers with one line of JSON for each batch. A batch
that takes too long ends the process: by the C-level watchdog of `faulthandler`, which also ends what
never gives the interpreter back, a regular expression for one. Its stack goes to standard error.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any


def search(rows: Sequence[dict[str, Any]], *, pattern: str, whole: bool) -> list[float]:
    """Return 1 for each response that the pattern is found in, or that it is the whole of, else 0."""
    compiled = re.compile(pattern)
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(row["response"]) is not None) for row in rows]


def main() -> None:
    """Serve the job on standard input."""
    # What the function prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.read())
    faulthandler.dump_traceback_later(job["start_timeout_s"], exit=True)
    try:
        module, _, name = job["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a foreign module raises is the answer
        _tell(answers, {"cannot_load": _in_words(error)})
        return
    for batch in job["batches"]:
        faulthandler.dump_traceback_later(job["timeout_s"], exit=True)
        _tell(answers, _answer(function, batch, job["parameters"]))
    faulthandler.cancel_dump_traceback_later()


def _answer(function: Callable[..., Any], batch: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
    try:
        given = list(function(batch, **parameters))
    except Exception as error:  # see main
        return {"error": _in_words(error)}
    if len(given) != len(batch):
        return {"error": f"it returned {len(given)} numbers for {len(batch)} responses", "is_count": True}
    return {"scores": [_as_number(value) for value in given]}


def _as_number(value: Any) -> float | str | None:
    """Return a finite number or None as they are, anything else in words."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{value!r} is no number"[:200]
    return number if math.isfinite(number) else f"{number} is not finite"


def _in_words(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else ""  # noqa: PTH119
    return f"{type(error).__name__}: {error}{place}"[:500]


def _tell(answers: Any, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
