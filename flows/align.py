"""The whole loop as one flow: collect, filter, SFT, reward model, candidates, evaluate, gate, promote."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run

from flows.candidates import Material, train_candidates
from flows.stage_runs import Stages
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import ArtifactRef, Verdict
from pipeline_lib.stages.collect import pin_sources
from pipeline_lib.stages.iterate import RoundStart
from pipeline_lib.stages.memory import check_memory
from pipeline_lib.stages.places import open_places
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.stages.promote import Promotion, incumbent
from pipeline_lib.stages.report import ReportConfig, further_inputs
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.stages.sft import selection_input
from pipeline_lib.validation import Frozen
from tasks.interrupts import lasting_interrupts
from tasks.promotion import promote_winner
from tasks.services import Services, open_services


class AlignResult(Frozen):
    """What a run of the flow came to."""

    verdict: Verdict
    promotion: Promotion
    report: ArtifactRef
    report_path: Path
    winner_uri: str | None
    reward_models: dict[str, ArtifactRef]
    """The further reward models of the run, by name."""
    artifacts: dict[str, ArtifactRef]
    """Data set, SFT model, reward model, verdict, report and candidates, by role."""


@flow(name="align", flow_run_name="{config.name}", persist_result=False)
def align(config: RunConfig = RunConfig(), start: RoundStart | None = None) -> AlignResult:  # noqa: B008  (the form)
    """Align a language model with human preferences and promote it where the evidence allows.

    Args:
        config: Everything about the run, one section a stage.
        start: Where the run is one round of several: its number, and what it goes on from.
    """
    runtime = config.runtime
    with lasting_interrupts(), open_services(runtime, experiment=config.name) as services:
        _start_tracking(config, services, start)
        status = "FAILED"
        try:
            result = _run(config, services, start)
            status = "FINISHED"
        finally:
            services.tracker.finish(status, {})
    return result


def _run(config: RunConfig, services: Services, start: RoundStart | None) -> AlignResult:
    stage, before = Stages(services), start or RoundStart()
    judge = selection_input(config.sft, services.store, before.reward_model)
    base = stage("base_model", config.model)
    check_memory(config, base, services.store)
    rows = stage("collect", pin_sources(config.collect, open_places(services.store)))
    dataset = stage("filter", config.filter, rows=rows, base_model=base)
    if config.sample.max_prompts > 0:
        dataset = stage("sample", config.sample, base_model=base, dataset=dataset)

    sft, reward = _sft_and_reward(config, stage, before, {"base_model": base, "dataset": dataset, **judge})
    rewards = {
        name: stage.named(f"reward:{name}", "reward", further, {"sft_model": sft, "dataset": dataset})
        for name, further in config.reward_models.items()
    }
    candidates = train_candidates(
        config, stage, Material(base=base, sft=sft, reward=reward, dataset=dataset, reward_models=rewards)
    )

    champion = incumbent(services.store, config.promote.model_name, list(candidates.values()))
    models = {"base": base, "sft": sft, **candidates, **({"champion": champion} if champion else {})}
    evidence = {
        f"evaluation:{name}": stage.named(
            f"evaluate:{name}", "evaluate", config.evaluate,
            {"model": model, "reference_model": sft, "reward_model": reward, "dataset": dataset},
        )
        for name, model in models.items()
    }  # fmt: skip
    gate = config.gate.model_copy(update={"candidates": tuple(candidates)})
    verdict_ref = stage.named("gate", "gate", gate, {"reward_model": reward, **evidence})
    promoted: State[Promotion] = promote_winner(
        config.promote, verdict_ref, services, _version_tags(config, dataset, start), return_state=True
    )
    promotion = promoted.result()
    shown = ReportConfig(name=_label(config, start), promotes=config.promote.enabled)
    told = {"verdict": verdict_ref, "dataset": dataset, **further_inputs(rewards)}
    report = stage("report", shown, **told)
    made = {"dataset": dataset, "sft_model": sft, "reward_model": reward, "verdict": verdict_ref, "report": report}
    made |= {f"candidate:{name}": model for name, model in candidates.items()}
    return _finish(_label(config, start), services, promotion, rewards, made)


def _label(config: RunConfig, start: RoundStart | None) -> str:
    """Return the name of the run, or of its round."""
    return config.name if start is None else start.label(config.name)


def _sft_and_reward(
    config: RunConfig, stage: Stages, start: RoundStart, inputs: dict[str, ArtifactRef]
) -> tuple[ArtifactRef, ArtifactRef]:
    """Train the SFT model and the reward model; a further round only those that its schedule says."""
    retrain = config.iterate.retrain
    if start.model is None or "sft" in retrain:
        pinned = pin_pretraining(config.sft, open_places(stage.services.store))
        sft = stage("sft", pinned, **inputs | {"base_model": start.model or inputs["base_model"]})
    else:
        sft = start.model
    if start.reward_model is None or "reward" in retrain:
        return sft, stage("reward", config.reward, sft_model=sft, dataset=inputs["dataset"])
    return sft, start.reward_model


def _start_tracking(config: RunConfig, services: Services, start: RoundStart | None) -> None:
    tags = {"prefline.config_sha256": _config_sha256(config)}
    if start is not None:
        tags["prefline.round"] = str(start.number)
    if flow_run.id:
        tags |= {
            "prefect.flow_run_id": str(flow_run.id),
            "prefect.deployment": str(deployment.id or ""),
        }
    params = {"config": config.name, "base_model": config.model.source}
    services.tracker.start(_label(config, start), params=params, tags=tags)


def _config_sha256(config: RunConfig) -> str:
    return sha256_json(config.model_dump(mode="json", exclude={"runtime"}))


def _version_tags(config: RunConfig, dataset: ArtifactRef, start: RoundStart | None) -> dict[str, str]:
    """Return the tags by which a version leads back to its data and configuration."""
    return {
        "prefline.run": _label(config, start),
        "prefline.config_sha256": _config_sha256(config),
        "prefline.dataset_id": dataset.id,
        "prefect.flow_run_id": str(flow_run.id or ""),
    }


def _finish(
    label: str, services: Services, promotion: Promotion, rewards: dict[str, ArtifactRef], made: dict[str, ArtifactRef]
) -> AlignResult:
    """Put the report where people look for it, and gather the result."""
    directory = services.runtime.home.absolute() / "reports" / label
    services.store.fetch(made["report"], directory)
    path = directory / "report.html"
    services.tracker.log_file(path)
    verdict = Verdict.model_validate(services.store.read_json(made["verdict"], "verdict.json"))
    create_markdown_artifact(_markdown(verdict, promotion, path), key="verdict", description=f"Gate: {label}")
    return AlignResult(
        verdict=verdict, promotion=promotion, report=made["report"], report_path=path, reward_models=rewards,
        winner_uri=services.store.uri(promotion.model) if promotion.model else None, artifacts=made,
    )  # fmt: skip


def _markdown(verdict: Verdict, promotion: Promotion, path: Path) -> str:
    lines = [f"# {promotion.status.replace('_', ' ')}: {promotion.reason}", ""]
    for candidate in verdict.candidates:
        lines += [f"## {candidate.name}: {'passed' if candidate.is_passed else 'failed'}", ""]
        lines += ["| rule | figure | interval | verdict |", "|---|---|---|---|"]
        for rule in candidate.rules:
            shown = rule.estimate
            figure = "–" if shown.value is None else f"{shown.value:.4g}"
            interval = "–" if shown.low is None or shown.high is None else f"{shown.low:.4g} … {shown.high:.4g}"
            lines.append(f"| {rule.rule} | {figure} | {interval} | {rule.status}: {rule.reason} |")
        lines.append("")
    lines.append(f"Full report: `{path.name}` in the run's report artifact and in MLflow.")
    return "\n".join(lines)
