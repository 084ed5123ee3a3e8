"""The one task that runs a stage: look-up, retries, progress, metrics, a state that says `Cached`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from pydantic import BaseModel

from pipeline_lib.errors import LabelsWantedError, PipelineError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages import STAGES
from pipeline_lib.stages.execute import Job, execute
from pipeline_lib.tracking import StageRun
from tasks.live_artifact import LiveArtifact
from tasks.progress import Bar, console
from tasks.services import Services

_LOG_EVERY_S = 15.0


class TaskEvents:
    """Passes a stage's events on: to the terminal, to Prefect, to MLflow."""

    def __init__(self, name: str, run: StageRun, *, is_training: bool) -> None:
        self._name, self._run, self._logger = name, run, get_run_logger()
        self._bar: Bar = console.bar(name)
        self._artifact = LiveArtifact(name, is_eager=is_training)
        self._last_log_s = time.monotonic()

    def progress(self, fraction: float, text: str) -> None:
        """Move the bar, and now and then Prefect's progress artifact and log."""
        self._bar.move(fraction, text)
        self._artifact.move(fraction, text)
        now = time.monotonic()
        if now - self._last_log_s >= _LOG_EVERY_S:
            self._last_log_s = now
            self._logger.info("%s: %s", self._name, text)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send figures to MLflow; the newest ones stand in the progress artifact."""
        self._run.metrics(step, values)
        self._artifact.note(values)

    def log(self, text: str) -> None:
        """Show a line on the bar, in the progress artifact and in Prefect's log."""
        self._bar.say(text)
        self._artifact.say(text)
        self._logger.info("%s: %s", self._name, text)

    def finish(self, text: str, *, is_done: bool = True) -> None:
        """Complete the bar and the progress artifact."""
        self._bar.finish(text)
        self._artifact.finish(text, is_done=is_done)


def is_transient(task: Any, run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Retry only what may be gone by itself: an unreachable store, a killed child, a held lease."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, PipelineError) and error.is_transient


@task(
    name="stage", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=is_transient,
)  # fmt: skip
def run_stage(stage: str, config: BaseModel, inputs: dict[str, ArtifactRef], services: Services, name: str) -> Any:
    """Run a stage, or answer from the store.

    Args:
        stage: Its name in the table of stages.
        config: Its configuration.
        inputs: Its input artifacts by role.
        services: The flow run's services.
        name: Name of the task run, e.g. `evaluate:dpo`.

    Returns:
        A completed state with the artifact's reference, called `Cached` where nothing was run; a failed one
        called `LabelsWanted` where people have to label something first.
    """
    job = Job(
        stage=stage, config=config.model_dump(mode="json"), inputs=inputs, storage=services.storage,
        home=services.runtime.home.absolute(), checkpoint_every_s=services.runtime.checkpoint_every_s,
        threads=services.runtime.threads, processes=services.runtime.processes if STAGES[stage].is_training else 1,
        sharding=services.runtime.sharding if STAGES[stage].is_training else "none",
    )  # fmt: skip
    run = services.tracker.stage(name)
    run.start(params={"stage_key": job.key}, inputs=inputs)
    events = TaskEvents(name, run, is_training=STAGES[stage].is_training)
    try:
        outcome = execute(job, store=services.store, events=events)
    except LabelsWantedError as error:
        events.finish("waits for labels of people", is_done=False)
        run.finish("KILLED", metrics={}, tags={"prefline.error": error.cause[:400]})
        return Failed(name="LabelsWanted", message=str(error), data=error)
    except PipelineError as error:
        events.finish(f"failed: {error.code}", is_done=False)
        run.finish("FAILED", metrics={}, tags={"prefline.error": error.cause[:400]})
        raise
    except BaseException:
        events.finish("interrupted", is_done=False)
        run.finish("KILLED", metrics={}, tags={})
        raise
    manifest = services.store.manifest(outcome.ref)
    events.finish("cached" if outcome.is_cached else f"done in {outcome.wall_s:.1f} s")
    tags = {"prefline.artifact_id": outcome.ref.id, "prefline.cached": str(outcome.is_cached).lower()}
    run.finish("FINISHED", metrics=manifest.metrics, tags=tags)
    word = "Cached" if outcome.is_cached else "Completed"
    return Completed(name=word, message=f"{outcome.ref}", data=outcome.ref)
