"""`kill -9` of a training child at a dozen points: the same command goes on, to the same sha256.

The stages of the smoke preset run without Prefect, each killed where the environment says; a
second store runs them undisturbed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline_lib.config import PRESETS, load
from pipeline_lib.errors import MemoryLimitError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.collect import pin_sources
from pipeline_lib.stages.execute import Job, execute
from pipeline_lib.stages.faults import KILL_VARIABLE
from pipeline_lib.stages.places import open_places
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from tests.stage_bench import Told

pytestmark = [pytest.mark.servers, pytest.mark.slow]

KILLS = {
    "base_model": ["before_commit", "after_commit"],
    "sft": ["step-0", "step-1", "before_commit", "after_commit"],
    "reward": ["step-0", "before_commit"],
    "reference_logps": ["before_commit"],
    "preference": ["step-0", "before_commit"],
    "ppo": ["step-0", "step-2", "step-5", "step-7", "before_commit"],
    "evaluate": ["before_commit"],
}


class Line:
    """The stages of the smoke preset, one after another, in one store."""

    def __init__(self, settings: S3Settings, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.home, self.monkeypatch = settings, home, monkeypatch
        self.store = ArtifactStore(settings, cache_directory=home / "cache")
        self.config = load(PRESETS / "smoke.yaml", RunConfig, ["ppo.iterations=2"]).value
        self.killed = 0

    def job(self, stage: str, config: object, inputs: dict[str, ArtifactRef]) -> Job:
        dumped = config.model_dump(mode="json")  # type: ignore[attr-defined]
        return Job(
            stage=stage, config=dumped, inputs=inputs, storage=self.settings, home=self.home, checkpoint_every_s=0,
            threads=1,
        )  # fmt: skip

    def run(self, stage: str, config: object, *, kills: list[str], **inputs: ArtifactRef) -> ArtifactRef:
        job = self.job(stage, config, inputs)
        for point in kills:
            self.monkeypatch.setenv(KILL_VARIABLE, f"{stage}:{point}")
            with pytest.raises(MemoryLimitError, match="killed by signal 9"):
                execute(job, store=self.store, events=Told())
            self.killed += 1
            self.monkeypatch.delenv(KILL_VARIABLE)
            if point == "after_commit":
                assert execute(job, store=self.store, events=Told()).is_cached
                return self.store.find(job.key)  # type: ignore[return-value]
        told = Told()
        outcome = execute(job, store=self.store, events=told)
        assert not outcome.is_cached
        if kills and kills[0].startswith("step-"):
            last = max(int(point.removeprefix("step-")) for point in kills if point.startswith("step-"))
            # The step at which it was killed had a checkpoint before it, and no step before that runs again.
            assert min((step for step, _ in told.figures), default=last) >= last
            assert any("resumed from the checkpoint" in text for text in told.texts) or last == 0
        return outcome.ref

    def run_all(self, kills: Mapping[str, list[str]]) -> dict[str, ArtifactRef]:
        def points(stage: str) -> list[str]:
            return kills.get(stage, [])

        config = self.config
        base = self.run("base_model", config.model, kills=points("base_model"))
        rows = self.run("collect", pin_sources(config.collect, open_places(self.store)), kills=[])
        data = self.run("filter", config.filter, kills=[], rows=rows, base_model=base)
        sft = self.run("sft", config.sft, kills=points("sft"), base_model=base, dataset=data)
        reward = self.run("reward", config.reward, kills=points("reward"), sft_model=sft, dataset=data)
        logps = self.run(
            "reference_logps",
            config.dpo.reference_logps(),
            kills=points("reference_logps"),
            sft_model=sft,
            dataset=data,
        )
        dpo = self.run(
            "preference", config.dpo, kills=points("preference"), sft_model=sft, dataset=data, reference_logps=logps
        )
        ppo = self.run("ppo", config.ppo, kills=points("ppo"), sft_model=sft, reward_model=reward, dataset=data)
        evaluation = self.run(
            "evaluate", config.evaluate, kills=points("evaluate"),
            model=ppo, reference_model=sft, reward_model=reward, dataset=data,
        )  # fmt: skip
        return {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "evaluation": evaluation}


@pytest.fixture
def lines(s3_server: S3Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Line, Line]:
    disturbed = s3_server.model_copy(update={"prefix": f"{tmp_path.name}-killed"})
    quiet = s3_server.model_copy(update={"prefix": f"{tmp_path.name}-quiet"})
    return Line(disturbed, tmp_path / "killed", monkeypatch), Line(quiet, tmp_path / "quiet", monkeypatch)


@pytest.mark.timeout(600)
def test_a_run_killed_at_a_dozen_points_ends_with_the_models_of_an_undisturbed_one(lines: tuple[Line, Line]) -> None:
    killed, quiet = lines
    expected = quiet.run_all({})
    assert killed.run_all(KILLS) == expected
    assert killed.killed >= 10
    assert not list(killed.store.objects.list("checkpoints/")), "checkpoints are cleared once the stage is done"
