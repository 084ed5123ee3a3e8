"""The task that registers candidates and moves the champion."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.states import Completed

from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.promote import PromoteConfig, promote
from pipeline_lib.tracking import ModelRegistry
from tasks.progress import console
from tasks.services import Services
from tasks.stage_task import is_transient


@task(
    name="promote", task_run_name="promote", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=is_transient,
)  # fmt: skip
def promote_winner(config: PromoteConfig, verdict: ArtifactRef, services: Services, tags: dict[str, str]) -> Any:
    """Register all candidates; move pointer and alias to the winner. Doing it again changes nothing."""
    bar = console.bar("promote")
    promotion = promote(
        config, verdict, store=services.store, registry=ModelRegistry(services.tracking),
        cache=services.runtime.home.absolute() / "work" / "promotion", run_id=services.tracker.run_id, tags=tags,
    )  # fmt: skip
    bar.finish(promotion.status.replace("_", " "))
    if promotion.status == "promoted" and promotion.model is not None:
        emit_event(
            "prefline.model.promoted",
            resource={"prefect.resource.id": f"prefline.model.{config.model_name}"},
            payload={"version": promotion.version, "artifact": promotion.model.id},
        )
    word = "Cached" if promotion.status == "already_champion" else "Completed"
    return Completed(name=word, message=promotion.reason, data=promotion)
