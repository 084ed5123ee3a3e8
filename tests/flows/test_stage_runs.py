"""Stages side by side: an interrupt of the flow reaches those whose children other threads wait for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flows import stage_runs
from flows.stage_runs import Stages
from pipeline_lib.errors import DataError
from pipeline_lib.stages import child
from pipeline_lib.stages.sft import SftConfig


class Child:
    """A stage's process, as far as it can be ended."""

    def __init__(self) -> None:
        self.is_asked = False

    def terminate(self) -> None:
        self.is_asked = True


@pytest.mark.parametrize(
    ("error", "is_asked"),
    [(KeyboardInterrupt(), True), (SystemExit(), True), (DataError("no rows", next_step="collect some"), False)],
)
def test_an_interrupt_ends_the_children_and_a_failed_stage_does_not(
    error: BaseException, is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result() -> Any:
        raise error

    running = Child()
    monkeypatch.setattr(child, "_running", {running})
    monkeypatch.setattr(stage_runs.run_stage, "submit", lambda *_: SimpleNamespace(result=result))
    services: Any = SimpleNamespace(runtime=SimpleNamespace(max_parallel_stages=2))
    with pytest.raises(type(error)):
        Stages(services).together({"one": ("sft", SftConfig(), {}), "other": ("sft", SftConfig(), {})})
    assert running.is_asked == is_asked
