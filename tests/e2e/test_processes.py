"""A stage in two processes, its weights whole or divided: the training of one, and a clear end where one dies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pipeline_lib.config import PRESETS, load
from pipeline_lib.errors import ChildDiedError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.collect import pin_sources
from pipeline_lib.stages.execute import Job, execute
from pipeline_lib.stages.faults import KILL_VARIABLE
from pipeline_lib.stages.places import open_places
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from tests.stage_bench import Told, commit
from tests.toy import furthest

pytestmark = [pytest.mark.servers, pytest.mark.slow]


class Place:
    """A store under a prefix of its own, and the data set of the smoke preset in it: made, or that of another place."""

    def __init__(self, settings: S3Settings, home: Path, like: Place | None = None) -> None:
        self.settings, self.home = settings, home
        self.store = ArtifactStore(settings, cache_directory=home / "cache")
        config = load(PRESETS / "smoke.yaml", RunConfig).value
        self.config = config.sft
        self.inputs = self.made(config) if like is None else {name: self.copied(like, name) for name in like.inputs}

    def made(self, config: RunConfig) -> dict[str, ArtifactRef]:
        base = self.run("base_model", config.model, {})
        rows = self.run("collect", pin_sources(config.collect, open_places(self.store)), {})
        return {"base_model": base, "dataset": self.run("filter", config.filter, {"rows": rows, "base_model": base})}

    def copied(self, other: Place, name: str) -> ArtifactRef:
        ref, folder = other.inputs[name], self.home / name
        other.store.fetch(ref, folder)
        return commit(self.store, folder, ref.kind)

    def run(self, stage: str, config: object, inputs: dict[str, ArtifactRef], **how: Any) -> ArtifactRef:
        dumped = config.model_dump(mode="json")  # type: ignore[attr-defined]
        job = Job(stage=stage, config=dumped, inputs=inputs, storage=self.settings, home=self.home, **how)
        return execute(job, store=self.store, events=Told()).ref

    def losses(self, ref: ArtifactRef) -> list[float]:
        return [json.loads(line)["loss"] for line in self.store.read_lines(ref, "metrics.jsonl")]

    def weights(self, ref: ArtifactRef) -> dict[str, Tensor]:
        self.store.fetch(ref, self.home / ref.id)
        return load_file(self.home / ref.id / "model" / "model.safetensors")


@pytest.mark.timeout(400)
def test_two_processes_train_as_one_and_a_lost_one_is_named(
    s3_server: S3Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hows: list[dict[str, Any]] = [{"threads": 1}, {"processes": 2}, {"processes": 2, "sharding": "full"}]
    places: list[Place] = []
    for n in range(3):
        settings = s3_server.model_copy(update={"prefix": f"{tmp_path.name}-{n}"})
        places.append(Place(settings, tmp_path / str(n), like=places[0] if places else None))
    refs = [place.run("sft", place.config, place.inputs, **how) for place, how in zip(places, hows, strict=True)]
    losses = [place.losses(ref) for place, ref in zip(places, refs, strict=True)]
    weights = [place.weights(ref) for place, ref in zip(places, refs, strict=True)]
    assert len(losses[0]) >= 2
    for n in (1, 2):
        assert losses[n] == pytest.approx(losses[0], abs=1e-5)
        assert furthest(weights[n], weights[0]) <= 1e-5

    monkeypatch.setenv(KILL_VARIABLE, "sft:process-1")
    other = places[1].config.model_copy(update={"seed": 5})
    with pytest.raises(ChildDiedError, match="process 1 of stage sft's 2 ended with code -9"):
        places[1].run("sft", other, places[1].inputs, processes=2)
