"""What is told of a running stage: its progress artifact moves and says how it ended, and nothing of it stops a run."""

from __future__ import annotations

import io
import uuid
from typing import Any

import pytest

from tasks import live_artifact
from tasks.live_artifact import EVERY_S, LiveArtifact
from tasks.progress import Terminal


class Server:
    """Stands for Prefect: remembers what an artifact was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.keys: list[str] = []
        self.told: list[tuple[float, str]] = []
        self.is_down = False
        monkeypatch.setattr(live_artifact, "create_progress_artifact", self.create)
        monkeypatch.setattr(live_artifact, "update_progress_artifact", self.update)

    def create(self, progress: float, *, key: str, description: str) -> uuid.UUID:
        if self.is_down:
            raise ConnectionError("no server")
        self.keys.append(key)
        self.told.append((progress, description))
        return uuid.UUID(int=1)

    def update(self, artifact_id: uuid.UUID, progress: float, *, description: str) -> None:
        if self.is_down:
            raise ConnectionError("no server")
        assert artifact_id == uuid.UUID(int=1)
        self.told.append((progress, description))

    def artifact(self, name: str = "ppo", **how: Any) -> LiveArtifact:
        return LiveArtifact(name, **{"is_eager": True, "clock": lambda: self.now, **how})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def test_it_moves_with_the_newest_figures_but_not_too_often(server: Server) -> None:
    artifact = server.artifact()
    artifact.move(0.0, "sampled 1/8")
    artifact.note({"ppo/score": 0.5, "ppo/ref_kl_nats": 1.25, "ppo/kl_coef": 0.2, "ppo/reward/score": 9.0})
    artifact.note({"ppo/rollout_tokens_per_s": 1234.5, "ppo/heldout_score": -0.125})
    artifact.move(0.25, "step 2/8")
    server.now = EVERY_S
    artifact.move(0.5, "step 4/8")
    artifact.move(0.625, "step 5/8")
    server.now += EVERY_S / 2
    artifact.say("scoring")
    server.now += EVERY_S / 2
    artifact.note({"ppo/score": 0.75})
    artifact.say("scoring")
    artifact.finish("done in 6.0 s", is_done=True)
    figures = "held-out score -0.125 · KL 1.25 nats a response · 1234 tokens/s sampled"
    assert server.told == [
        (0.0, "**ppo** sampled 1/8"),
        (50.0, f"**ppo** step 4/8 · score 0.5 · {figures}"),
        (62.5, f"**ppo** scoring · score 0.75 · {figures}"),
        (100.0, f"**ppo** done in 6.0 s · score 0.75 · {figures}"),
    ]
    assert server.keys == ["ppo-progress"]


def test_a_short_stage_that_trains_nothing_has_none(server: Server) -> None:
    artifact = server.artifact(is_eager=False)
    artifact.move(0.5, "half")
    artifact.finish("done", is_done=True)
    assert server.told == []
    server.now = EVERY_S
    artifact.move(0.5, "half")
    assert server.told == [(50.0, "**ppo** half")]


def test_a_failed_stage_stays_where_it_was_and_says_so(server: Server) -> None:
    artifact = server.artifact()
    artifact.move(0.25, "step 2/8")
    artifact.finish("failed: E_REWARD", is_done=False)
    assert server.told[-1] == (25.0, "**ppo** failed: E_REWARD")


def test_a_figure_that_the_text_tells_already_is_not_told_twice(server: Server) -> None:
    artifact = server.artifact()
    artifact.note({"ppo/loss": 0.5, "ppo/score": 1.0})
    artifact.move(0.25, "step 2/8, loss 0.5000")
    artifact.finish("done in 1.0 s", is_done=True)
    assert [text for _, text in server.told] == [
        "**ppo** step 2/8, loss 0.5000 · score 1", "**ppo** done in 1.0 s · score 1 · loss 0.5",
    ]  # fmt: skip


def test_keys_are_such_as_prefect_takes(server: Server) -> None:
    for name, key in (
        ("reward:safe_one", "reward-safe-one-progress"),
        ("iterated.dpo:round-1:reference_logps", "iterated-dpo-round-1-reference-logps-progress"),
    ):
        assert server.artifact(name).key == key


def test_a_server_that_is_away_stops_nothing(server: Server) -> None:
    artifact = server.artifact()
    server.is_down = True
    artifact.move(0.1, "step 1/8")
    server.now = EVERY_S
    server.is_down = False
    artifact.move(0.5, "step 4/8")
    server.is_down = True
    artifact.finish("done", is_done=True)
    assert server.told == [(50.0, "**ppo** step 4/8")]


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    terminal = Terminal(Closed())
    bar = terminal.bar("sft")
    bar.finish("done in 1.0 s")
    assert terminal.is_quiet
    bar.finish("done in 1.0 s")
