"""Pointers: of several racers exactly one wins, the others are told so."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest

from pipeline_lib.errors import ConflictError, IntegrityError
from pipeline_lib.storage.pointer import Pointer
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore

pytestmark = pytest.mark.servers

RACERS, ROUNDS = 8, 6


def test_a_pointer_moves_only_from_its_latest_state(store: ArtifactStore) -> None:
    pointer = Pointer(store, "champion-x")
    assert pointer.read() is None
    first = pointer.swap(None, {"model": "a"})
    assert pointer.read() == ({"model": "a"}, first)
    second = pointer.swap(first, {"model": "b"})
    for stale in (None, first, '"0123"'):
        with pytest.raises(ConflictError, match="'champion-x' was changed"):
            pointer.swap(stale, {"model": "c"})
    assert pointer.read() == ({"model": "b"}, second)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_pointer_is_named(store: ArtifactStore, content: bytes) -> None:
    store.objects.put("pointers/champion-x.json", content)
    with pytest.raises(IntegrityError, match="the pointer 'champion-x'"):
        Pointer(store, "champion-x").read()


def race(settings: S3Settings, racer: int, expected: list[str | None], start: Barrier, results: Any) -> None:
    """Try the swap of every round at the same moment as the other racers, and tell which were won."""
    store = ArtifactStore(settings)
    won = []
    for number, etag in enumerate(expected):
        start.wait(30)
        try:
            Pointer(store, f"race-{number}").swap(etag, {"winner": racer})
            won.append(True)
        except ConflictError:
            won.append(False)
    results.put((racer, won))


def test_eight_processes_race(store: ArtifactStore) -> None:
    """Half of the rounds create the pointer, half move it."""
    expected = [
        Pointer(store, f"race-{number}").swap(None, {"winner": None}) if number % 2 else None
        for number in range(ROUNDS)
    ]
    context = multiprocessing.get_context("fork")
    start, queue = context.Barrier(RACERS), context.Queue()
    racers = [
        context.Process(target=race, args=(store.settings, racer, expected, start, queue)) for racer in range(RACERS)
    ]
    for process in racers:
        process.start()
    results = dict(queue.get(timeout=60) for _ in racers)
    for process in racers:
        process.join()
    for number in range(ROUNDS):
        winners = [racer for racer, won in results.items() if won[number]]
        assert len(winners) == 1, f"round {number}"
        found = Pointer(store, f"race-{number}").read()
        assert found is not None
        assert found[0] == {"winner": winners[0]}
