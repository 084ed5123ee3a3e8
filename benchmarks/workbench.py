"""Runs the real stages outside of a flow: a store, the prepared artifacts, and an eye on the loop."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.jobs import JOBS, JobName, Options
from benchmarks.same import (
    BETAS,
    CENTRING,
    DPO_BETA,
    EPSILON,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_RANK,
    MAX_GRAD_NORM,
    SEED,
)
from pipeline_lib.models import scoring
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages import STAGES
from pipeline_lib.stages.contract import StageContext, StageOutput
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.loop import TrainingLoop

NEVER_S = 1e9


class TrainingOverError(Exception):
    """Ends a stage once its training is done: what follows is not measured."""


@dataclass
class Heard:
    """What a stage told while it ran."""

    losses: list[float] = field(default_factory=list)
    step_ends_s: list[float] = field(default_factory=list)
    on_step: Callable[[], None] = lambda: None

    def progress(self, fraction: float, text: str) -> None:
        """Take no notice."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note an update's loss and the time."""
        self.step_ends_s.append(time.perf_counter())
        self.losses.append(next(value for name, value in values.items() if name.endswith("/loss")))
        assert len(self.losses) == step + 1
        self.on_step()

    def log(self, text: str) -> None:
        """Take no notice."""


class FreshStore(ArtifactStore):
    """Finds by stage key what this process made and nothing of before: every process does its own work."""

    def __init__(self, settings: S3Settings, *, cache_directory: Path) -> None:
        """Open the store."""
        super().__init__(settings, cache_directory=cache_directory)
        self.made: dict[str, ArtifactRef] = {}

    def find(self, stage_key: str) -> ArtifactRef | None:
        """Return what this process committed under a key."""
        return self.made.get(stage_key)

    def commit(self, directory: Path, **named: Any) -> ArtifactRef:
        """Commit, and remember the key here alone."""
        ref = super().commit(directory, **{**named, "stage_key": None})
        if named["stage_key"] is not None:
            self.made[named["stage_key"]] = ref
        return ref


class Workbench:
    """Stages and their artifacts in one store."""

    def __init__(self, home: Path) -> None:
        """Open the store of a home; its server is running, its keys are in the environment."""
        self.home = home
        settings = S3Settings.model_validate_json((home / "store.json").read_bytes())
        self.store = FreshStore(settings, cache_directory=home / "cache")

    def run(
        self, stage: str, config: Mapping[str, Any], inputs: Mapping[str, ArtifactRef], heard: Heard | None = None
    ) -> ArtifactRef:
        """Run a stage as a flow would and commit its output; what it tells goes into `heard`."""
        spec = STAGES[stage]
        parsed = getattr(spec.load(), spec.config_class).model_validate(config)
        with tempfile.TemporaryDirectory(dir=self.home) as scratch:
            workdir = Path(scratch) / "output"
            workdir.mkdir()
            context = StageContext(
                store=self.store, workdir=workdir, events=heard or Heard(),
                checkpoints=Checkpoints(self.store, f"benchmark-{Path(scratch).name}"), checkpoint_every_s=NEVER_S,
            )  # fmt: skip
            output = spec.run(parsed, inputs, context)
            assert isinstance(output, StageOutput)
            return self.store.commit(
                workdir, kind=output.kind, stage=spec.name, stage_version=spec.version,
                config=parsed.model_dump(mode="json"), inputs=inputs, metrics=output.metrics, measurements={},
                stage_key=None,
            )  # fmt: skip

    def commit(self, directory: Path, *, kind: str) -> ArtifactRef:
        """Commit a directory of the benchmark's own making."""
        return self.store.commit(
            directory, kind=kind, stage="benchmark", stage_version=1, config={}, inputs={}, metrics={},
            measurements={}, stage_key=None,
        )  # fmt: skip


def stage_config(job: JobName, options: Options, *, rows: int | None = None) -> dict[str, Any]:
    """Return the configuration of a job's stage; all that is not named stays at its default.

    Args:
        job: The job.
        options: The command line's choice.
        rows: Rows of an update, where they are not the job's own.
    """
    config: dict[str, Any] = {
        "batch_size": rows if rows is not None else rows_per_step(job, options),
        "epochs": 1,
        "seed": SEED,
        "precision": options.precision,
        "adapter": {"name": "lora", "rank": LORA_RANK, "alpha": LORA_ALPHA} if options.trainable == "lora" else None,
        "gradient_checkpointing": options.gradient_checkpointing,
        "optimizer": {
            "learning_rate": LEARNING_RATE, "betas": BETAS, "epsilon": EPSILON, "weight_decay": 0.0,
            "schedule": "constant", "warmup_frac": 0.0, "max_grad_norm": MAX_GRAD_NORM,
        },
    }  # fmt: skip
    if options.tokens_per_batch is not None:
        config["tokens_per_batch"] = options.tokens_per_batch
    if JOBS[job].stage == "preference":
        config["loss"] = {"name": "dpo", "beta": DPO_BETA}
    if JOBS[job].stage == "reward":
        config["loss"] = {"name": "bradley_terry", "centring": CENTRING}
    return config


def rows_per_step(job: JobName, options: Options) -> int:
    """Return the rows of an update: fewer where a row holds more responses, more where it holds one."""
    factor = {1: 2.0, 2: 1.0, 4: 0.5}[JOBS[job].responses]
    return max(1, int(options.rows_per_step * factor))


@contextmanager
def at_training(before: Callable[[TrainingLoop], None], *, train: bool) -> Iterator[None]:
    """Call a function when a stage is about to train, and end the stage when it has (or would have).

    The loop itself is the real one, untouched.
    """
    original = TrainingLoop.run

    def run(loop: TrainingLoop) -> list[dict[str, float]]:
        before(loop)
        if train:
            original(loop)
        raise TrainingOverError

    TrainingLoop.run = run  # type: ignore[method-assign, assignment]
    try:
        yield
    except TrainingOverError:
        pass
    finally:
        TrainingLoop.run = original  # type: ignore[method-assign]


@contextmanager
def timed_reference(spent: list[float]) -> Iterator[None]:
    """Note the seconds of every pass of reference log-probabilities, without the loading of the model."""
    original = scoring.response_logps

    def timed(*args: Any, **kwargs: Any) -> dict[str, list[float]]:
        started = time.perf_counter()
        found = original(*args, **kwargs)
        spent.append(time.perf_counter() - started)
        return found

    scoring.response_logps = timed
    try:
        yield
    finally:
        scoring.response_logps = original


def read_inputs(folder: Path) -> dict[str, ArtifactRef]:
    """Read the prepared input artifacts of a job, by role."""
    found = json.loads((folder / "inputs.json").read_text())
    return {role: ArtifactRef.model_validate(ref) for role, ref in found.items()}
