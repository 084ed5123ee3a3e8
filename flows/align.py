"""The whole loop as one flow: collect, filter, SFT, reward model, candidates, evaluate, gate, promote."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from pydantic import BaseModel

from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import ArtifactRef, Verdict
from pipeline_lib.stages.collect import pin_sources
from pipeline_lib.stages.memory import check_memory
from pipeline_lib.stages.places import open_places
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.stages.promote import Promotion, incumbent
from pipeline_lib.stages.report import ReportConfig
from pipeline_lib.stages.run_config import Candidate, RunConfig
from pipeline_lib.validation import Frozen
from tasks.promotion import promote_winner
from tasks.services import Services, open_services
from tasks.stage_task import run_stage


class AlignResult(Frozen):
    """What a run of the flow came to."""

    verdict: Verdict
    promotion: Promotion
    report: ArtifactRef
    report_path: Path
    winner_uri: str | None
    reward_models: dict[str, ArtifactRef]
    """The further reward models of the run, by name."""


class _Stages:
    """The stages of one flow run, called by name."""

    def __init__(self, config: RunConfig, services: Services) -> None:
        self.config, self.services = config, services

    def __call__(self, stage: str, config: BaseModel, **inputs: ArtifactRef) -> ArtifactRef:
        """Run a stage and wait for its artifact."""
        return self.named(stage, stage, config, inputs)

    def named(self, name: str, stage: str, config: BaseModel, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
        """Run a stage as a task run of a name of its own."""
        state: State[ArtifactRef] = run_stage(stage, config, inputs, self.services, name, return_state=True)
        return state.result()

    def together(self, jobs: dict[str, tuple[Candidate, dict[str, ArtifactRef]]]) -> dict[str, ArtifactRef]:
        """Train candidates, which do not depend on each other, side by side where the run allows it."""
        if self.services.runtime.max_parallel_stages == 1:
            return {name: self.named(name, config.method, config, inputs) for name, (config, inputs) in jobs.items()}
        futures = {
            name: run_stage.submit(config.method, config, inputs, self.services, name)
            for name, (config, inputs) in jobs.items()
        }
        return {name: future.result() for name, future in futures.items()}


@flow(name="align", flow_run_name="{config.name}", persist_result=False)
def align(config: RunConfig = RunConfig()) -> AlignResult:  # noqa: B008  (fills the form in Prefect's UI)
    """Align a language model with human preferences and promote it where the evidence allows.

    Args:
        config: Everything about the run, one section a stage.
    """
    runtime = config.runtime
    with open_services(runtime, experiment=config.name) as services:
        _start_tracking(config, services)
        status = "FAILED"
        try:
            result = _run(config, services)
            status = "FINISHED"
        finally:
            services.tracker.finish(status, {})
    return result


def _run(config: RunConfig, services: Services) -> AlignResult:
    stage = _Stages(config, services)
    base = stage("base_model", config.model)
    check_memory(config, base, services.store)
    rows = stage("collect", pin_sources(config.collect, open_places(services.store)))
    dataset = stage("filter", config.filter, rows=rows, base_model=base)
    if config.sample.max_prompts > 0:
        dataset = stage("sample", config.sample, base_model=base, dataset=dataset)

    sft = stage("sft", pin_pretraining(config.sft, open_places(services.store)), base_model=base, dataset=dataset)
    reward = stage("reward", config.reward, sft_model=sft, dataset=dataset)
    rewards = {
        name: stage.named(f"reward:{name}", "reward", further, {"sft_model": sft, "dataset": dataset})
        for name, further in config.reward_models.items()
    }
    candidates = _train_candidates(config, stage, base=base, sft=sft, reward=reward, dataset=dataset)

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
        config.promote, verdict_ref, services, _version_tags(config, dataset), return_state=True
    )
    promotion = promoted.result()
    shown = ReportConfig(name=config.name, promotes=config.promote.enabled)
    report = stage("report", shown, verdict=verdict_ref, dataset=dataset)
    return _finish(config, services, verdict_ref, promotion, report, rewards)


def _train_candidates(
    config: RunConfig, stage: _Stages, *, base: ArtifactRef, sft: ArtifactRef, reward: ArtifactRef, dataset: ArtifactRef
) -> dict[str, ArtifactRef]:
    """Train the candidates, each from the SFT model unless it says otherwise, side by side where allowed."""
    jobs: dict[str, tuple[Candidate, dict[str, ArtifactRef]]] = {}
    for name, candidate in config.all_candidates().items():
        inputs = {"sft_model": sft, "dataset": dataset}
        if isinstance(candidate, PreferenceConfig):
            inputs["sft_model"] = base if candidate.start_from == "base" else sft
            if candidate.needs_reference:
                task = "reference_logps" if name == "dpo" else f"reference_logps:{name}"
                inputs["reference_logps"] = stage.named(task, "reference_logps", candidate.reference_logps(), inputs)
        if isinstance(candidate, PpoConfig):
            inputs["reward_model"] = reward
        jobs[name] = (pin_pretraining(candidate, open_places(stage.services.store)), inputs)
    return stage.together(jobs)


def _start_tracking(config: RunConfig, services: Services) -> None:
    tags = {"prefline.config_sha256": _config_sha256(config)}
    if flow_run.id:
        tags |= {
            "prefect.flow_run_id": str(flow_run.id),
            "prefect.deployment": str(deployment.id or ""),
        }
    services.tracker.start(config.name, params={"config": config.name, "base_model": config.model.source}, tags=tags)


def _config_sha256(config: RunConfig) -> str:
    return sha256_json(config.model_dump(mode="json", exclude={"runtime"}))


def _version_tags(config: RunConfig, dataset: ArtifactRef) -> dict[str, str]:
    """Return the tags by which a version leads back to its data and configuration."""
    return {
        "prefline.run": config.name,
        "prefline.config_sha256": _config_sha256(config),
        "prefline.dataset_id": dataset.id,
        "prefect.flow_run_id": str(flow_run.id or ""),
    }


def _finish(
    config: RunConfig,
    services: Services,
    verdict_ref: ArtifactRef,
    promotion: Promotion,
    report: ArtifactRef,
    rewards: dict[str, ArtifactRef],
) -> AlignResult:
    """Put the report where people look for it, and gather the result."""
    directory = config.runtime.home.absolute() / "reports" / config.name
    services.store.fetch(report, directory)
    path = directory / "report.html"
    services.tracker.log_file(path)
    verdict = Verdict.model_validate(services.store.read_json(verdict_ref, "verdict.json"))
    create_markdown_artifact(_markdown(verdict, promotion, path), key="verdict", description=f"Gate: {config.name}")
    return AlignResult(
        verdict=verdict, promotion=promotion, report=report, report_path=path, reward_models=rewards,
        winner_uri=services.store.uri(promotion.model) if promotion.model else None,
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
