"""The task that runs a stage: what people see where it waits for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline_lib.errors import LabelsWantedError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.labels import LabelsConfig, PeopleLabels
from pipeline_lib.storage.s3 import S3Settings
from tasks import stage_task


class Ears:
    """Hears what the stage's bar and its run in MLflow are told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.tags: Mapping[str, str] = {}

    def __call__(self, *_: Any, **__: Any) -> Ears:
        return self

    def start(self, **_: Any) -> None: ...

    def finish(self, text: str, *, tags: Mapping[str, str] | None = None, **_: Any) -> None:
        self.told.append(text)
        self.tags = tags or {}


def test_a_stage_that_waits_for_people_has_a_state_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings_without_server: S3Settings
) -> None:
    bar, run = Ears(), Ears()

    def execute(*_: Any, **__: Any) -> None:
        raise LabelsWantedError("3 of 4 rows wait", next_step="write into each row `ranks`")

    monkeypatch.setattr(stage_task, "TaskEvents", bar)
    monkeypatch.setattr(stage_task, "execute", execute)
    runtime = SimpleNamespace(home=tmp_path, checkpoint_every_s=60.0, threads=None, processes=1, sharding="none")
    services = SimpleNamespace(
        runtime=runtime, storage=settings_without_server, tracker=SimpleNamespace(stage=run), store=None
    )
    config = LabelsConfig(labels=PeopleLabels(), file=str(tmp_path / "x.jsonl"))
    inputs = {"rollouts": ArtifactRef(kind="dataset", id="0" * 64)}
    state = stage_task.run_stage.fn("labels", config, inputs, services, "c:round-1:labels")  # type: ignore[arg-type]
    assert (state.name, state.is_failed()) == ("LabelsWanted", True)
    assert "3 of 4 rows wait" in str(state.message)
    assert bar.told == ["waits for labels of people"]
    assert run.tags == {"prefline.error": "3 of 4 rows wait"}
    assert not stage_task.is_transient(None, None, state)  # type: ignore[arg-type]
    with pytest.raises(LabelsWantedError):
        state.result()


@pytest.fixture
def settings_without_server() -> S3Settings:
    return S3Settings(endpoint_url="http://127.0.0.1:1", bucket="none")
