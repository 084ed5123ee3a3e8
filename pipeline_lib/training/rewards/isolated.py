"""Run a function on samples in a process of its own: what hangs or crashes there ends there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_lib.errors import RewardError
from pipeline_lib.training.rewards.contract import Resources, Sample

START_TIMEOUT_S = 120.0
"""For importing the function's module."""
MAX_LOST = 3
"""Responses that may hang or crash the process before the others are no longer tried."""
_GRACE_S = 10.0
_HUNG = re.compile(r'File "([^"]+)", line (\d+) in ')


@dataclass(frozen=True)
class Isolated:
    """A function by its place, with its parameters."""

    function: str
    """`package.module:function`, or `__main__:...` for one of the worker's own."""
    parameters: dict[str, Any]
    timeout_s: float
    """Seconds for one call."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> list[float | None]:
        """Score all samples in one call; where that fails, one by one to find out which.

        Raises:
            RewardError: The function cannot be loaded, or returns another count than it got samples and
                does so with none of them alone.
        """
        (answer,) = self._run([list(samples)]) if samples else [{"scores": []}]
        if "scores" in answer:
            return [_number(sample, value, resources) for sample, value in zip(samples, answer["scores"], strict=True)]
        found = self._one_by_one(samples, resources)
        if answer.get("is_count") and None not in found:
            # Each row has a number when it is alone: which one of all rows has none cannot be told.
            raise RewardError(f"{self.function}: {answer['error']}", next_step=_COUNT_STEP)
        return found

    def _one_by_one(self, samples: Sequence[Sample], resources: Resources) -> list[float | None]:
        found: list[float | None] = []
        num_lost = 0
        while len(found) < len(samples):
            if num_lost == MAX_LOST:
                for sample in samples[len(found) :]:
                    resources.on_problem(sample, f"not tried after {MAX_LOST} that hung or crashed")
                return found + [None] * (len(samples) - len(found))
            answers = self._run([[sample] for sample in samples[len(found) :]])
            for answer in answers:
                sample = samples[len(found)]
                if "error" in answer:
                    resources.on_problem(sample, answer["error"])
                    found.append(None)
                else:
                    found.append(_number(sample, answer["scores"][0], resources))
            num_lost += "is_lost" in answers[-1]
        return found

    def _run(self, batches: Sequence[Sequence[Sample]]) -> list[dict[str, Any]]:
        """Return the answers to the first batches: to all, or up to the one that ended the process."""
        job = {
            "function": self.function, "parameters": self.parameters, "timeout_s": self.timeout_s,
            "start_timeout_s": START_TIMEOUT_S, "batches": [[sample.plain() for sample in batch] for batch in batches],
        }  # fmt: skip
        limit_s = START_TIMEOUT_S + len(batches) * self.timeout_s + _GRACE_S
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        try:
            done = subprocess.run(
                command,
                input=json.dumps(job).encode(),
                capture_output=True,
                timeout=limit_s,
                env=environment,
                check=False,
            )
            output, errors, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as stuck:
            output, errors, code = stuck.stdout or b"", stuck.stderr or b"", 1
        answers: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
        if answers and "cannot_load" in answers[0]:
            raise RewardError(f"{self.function} cannot be loaded: {answers[0]['cannot_load']}", next_step=_LOAD_STEP)
        if len(answers) < len(batches):
            reason = self._what_ended_it(errors.decode("utf-8", errors="replace"), code)
            answers.append({"error": reason, "is_lost": True})
        return answers

    def _what_ended_it(self, errors: str, code: int) -> str:
        if "Timeout (" in errors:
            place = _HUNG.search(errors.partition("Timeout (")[2])
            where = f" at {Path(place[1]).name}:{place[2]}" if place else ""
            return f"hung for {self.timeout_s:g} s{where}"
        lines = errors.strip().splitlines()
        return f"its process ended with code {code}: {lines[-1][:300] if lines else 'no message'}"


_COUNT_STEP = "return one number, or None, for each response, in the order given"
_LOAD_STEP = "check the name, and that the module can be imported where training runs"


def _number(sample: Sample, value: float | str | None, resources: Resources) -> float | None:
    """Return a score; report one that is none."""
    if isinstance(value, float):
        return value
    resources.on_problem(sample, value or "it returned None")
    return None
