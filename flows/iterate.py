"""Rounds of the whole loop: each starts from the model that the one before led to."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.align import align
from pipeline_lib.stages.iterate import (
    RoundResult,
    RoundStart,
    config_of_round,
    find_round,
    model_of_next_round,
    record_round,
)
from pipeline_lib.stages.run_config import RunConfig
from tasks.services import open_store


@flow(name="iterate", flow_run_name="{config.name}", persist_result=False)
def iterate(
    config: RunConfig = RunConfig(),  # noqa: B008  (fills the form in Prefect's UI)
    rounds: int = 2,
) -> list[RoundResult]:
    """Align in rounds: each goes on from the champion, or from the best candidate, of those before.

    Every round is a run of its own, with its own runs in Prefect and MLflow, its own report and its
    own artifact, from which its lineage is read. Rounds that are finished are not run again.

    Args:
        config: Everything about the run; its section `iterate` says what further rounds do.
        rounds: How many rounds there are to be in all.
    """
    for number in range(1, rounds + 1):
        config_of_round(config, number)  # a change that does not fit is refused before anything runs
    results: list[RoundResult] = []
    start = RoundStart()
    with open_store(config.runtime.home) as (_, store):  # one server for all rounds
        for number in range(1, rounds + 1):
            of_round = config_of_round(config, number)
            result = find_round(store, of_round, start)
            if result is None:
                result = _run_round(of_round, start)
                record_round(store, of_round, result)
            results.append(result)
            start = result.next_start()
    create_markdown_artifact(_markdown(results), key="rounds", description=f"Rounds: {config.name}")
    return results


def _run_round(config: RunConfig, start: RoundStart) -> RoundResult:
    came_out = align(config, start)
    promotion = came_out.promotion
    promoted = promotion.model if promotion.status in ("promoted", "already_champion") else None
    return RoundResult(
        start=start, status=promotion.status, reason=promotion.reason, artifacts=came_out.artifacts,
        model=model_of_next_round(config.iterate, came_out.verdict, start, promoted),
    )  # fmt: skip


def _markdown(results: list[RoundResult]) -> str:
    lines = ["| round | started from | gate | next round starts from |", "|---|---|---|---|"]
    for result in results:
        begin, end = result.start.model or "the base model", result.model or "the base model"
        lines.append(f"| {result.start.number} | {begin} | {result.status.replace('_', ' ')} | {end} |")
    return "\n".join(lines)
