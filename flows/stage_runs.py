"""The stages of one flow run, called by name; each call is a task run."""

from __future__ import annotations

from prefect.client.schemas.objects import State
from pydantic import BaseModel

from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.child import end_children
from tasks.services import Services
from tasks.stage_task import run_stage

Jobs = dict[str, tuple[str, BaseModel, dict[str, ArtifactRef]]]
"""By the name of the task run: the stage, its configuration and its inputs."""


class Stages:
    """The stages of one flow run, called by name."""

    def __init__(self, services: Services) -> None:
        """Take the services that the stages share."""
        self.services = services

    def __call__(self, stage: str, config: BaseModel, **inputs: ArtifactRef) -> ArtifactRef:
        """Run a stage and wait for its artifact."""
        return self.named(stage, stage, config, inputs)

    def named(self, name: str, stage: str, config: BaseModel, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
        """Run a stage as a task run of a name of its own."""
        state: State[ArtifactRef] = run_stage(stage, config, inputs, self.services, name, return_state=True)
        return state.result()

    def together(self, jobs: Jobs) -> dict[str, ArtifactRef]:
        """Run stages that do not depend on each other side by side where the run allows it."""
        if self.services.runtime.max_parallel_stages == 1:
            return {name: self.named(name, *job) for name, job in jobs.items()}
        futures = {
            name: run_stage.submit(stage, config, inputs, self.services, name)
            for name, (stage, config, inputs) in jobs.items()
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except Exception:
            raise  # one stage failed; the others go on
        except BaseException:
            end_children()  # the interrupt is this thread's: those that wait for the stages never see it
            raise
