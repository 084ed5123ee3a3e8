"""A signal whose exception lands where Python forgets exceptions still ends the run."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from prefect.exceptions import TerminationSignal

from tasks.interrupts import lasting_interrupts


def as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def as_prefect(number: int, frame: object) -> None:
    raise TerminationSignal(signal=number)


class Forgetful:
    """Gets a signal in its destructor, where no exception leaves."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self) -> None:
        signal.raise_signal(self._number)


def forget_and_wait(number: int) -> None:
    Forgetful(number)  # gone at once, and the exception with it
    threading.Event().wait(60)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "handler", "error"),
    [
        (signal.SIGTERM, as_prefect, TerminationSignal),
        (signal.SIGTERM, as_interrupt, KeyboardInterrupt),
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ],
)
def test_a_forgotten_signal_comes_again(
    number: int, handler: Callable[[int, object], None], error: type[BaseException]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(number, handler)
    with pytest.raises(error), lasting_interrupts():
        forget_and_wait(number)


def test_other_forgotten_exceptions_go_the_way_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda forgotten: told.append(forgotten.exc_value))
    signal.signal(signal.SIGTERM, raise_value_error)
    before = sys.unraisablehook
    with lasting_interrupts():
        Forgetful(signal.SIGTERM)
    assert [str(error) for error in told] == ["not a signal's"]
    assert sys.unraisablehook is before


def test_prefect_learns_where_its_server_is_before_it_is_imported() -> None:
    """What the command line imports before `prefect_api`: Prefect's settings are those of its first import."""
    program = "import sys, flows.cli, flows.embedded, tasks.interrupts, tasks.progress; print('prefect' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def raise_value_error(number: int, frame: object) -> None:
    raise ValueError("not a signal's")
