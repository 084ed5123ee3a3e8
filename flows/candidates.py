"""How the candidates of a run are trained: one stage each, or a chain of rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from flows.stage_runs import Jobs, Stages
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.group import GrpoConfig, RlooConfig
from pipeline_lib.stages.labels import pin_labels
from pipeline_lib.stages.places import open_places
from pipeline_lib.stages.ppo import PpoConfig
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.pretraining import pin_pretraining
from pipeline_lib.stages.reward_models import heldout_input
from pipeline_lib.stages.rewards import pin_rewards, reward_inputs
from pipeline_lib.stages.rounds_config import IteratedDpoConfig, RejectionSettings, RoundsSettings
from pipeline_lib.stages.run_config import Candidate, RunConfig, start_of


@dataclass(frozen=True)
class Material:
    """What candidates are trained from and on."""

    base: ArtifactRef
    sft: ArtifactRef
    reward: ArtifactRef
    dataset: ArtifactRef
    reward_models: dict[str, ArtifactRef] = field(default_factory=dict)
    """The run's further reward models, by name."""


def train_candidates(config: RunConfig, stage: Stages, material: Material) -> dict[str, ArtifactRef]:
    """Train every candidate, one that starts from another after it, the others side by side where allowed."""
    trained = {"base": material.base, "sft": material.sft}
    waiting = dict(config.all_candidates())
    while waiting:
        ready = {name: each for name, each in waiting.items() if start_of(each) in trained}
        jobs: Jobs = {}
        for name, candidate in ready.items():
            if not isinstance(candidate, RoundsSettings):
                start = trained[start_of(candidate)]
                jobs[name] = _job(name, candidate, stage, start=start, material=material)
        trained |= stage.together(jobs)
        for name, candidate in ready.items():
            if isinstance(candidate, RoundsSettings):
                start = trained[start_of(candidate)]
                trained[name] = _train_in_rounds(name, candidate, stage, start=start, material=material)
            del waiting[name]
    return {name: trained[name] for name in config.all_candidates()}


def _job(
    name: str, candidate: Candidate, stage: Stages, *, start: ArtifactRef, material: Material
) -> tuple[str, Candidate, dict[str, ArtifactRef]]:
    """Return the stage that trains a candidate; what the reference says is computed before it."""
    inputs = {"sft_model": start, "dataset": material.dataset}
    if isinstance(candidate, PreferenceConfig):
        task = "reference_logps" if name == "dpo" else f"reference_logps:{name}"
        inputs |= _reference(task, candidate, stage, inputs)
    if isinstance(candidate, PpoConfig | RlooConfig | GrpoConfig):
        inputs["reward_model"] = material.reward
        inputs |= reward_inputs(candidate.rewards, material.reward_models)
        inputs |= heldout_input(candidate, material.reward_models, main=material.reward)
        candidate = pin_rewards(candidate)
    return candidate.method, pin_pretraining(candidate, open_places(stage.services.store)), inputs


def _reference(
    task: str, config: PreferenceConfig, stage: Stages, inputs: dict[str, ArtifactRef]
) -> dict[str, ArtifactRef]:
    if not config.needs_reference:
        return {}
    return {"reference_logps": stage.named(task, "reference_logps", config.reference_logps(), inputs)}


def _train_in_rounds(
    name: str, config: RoundsSettings, stage: Stages, *, start: ArtifactRef, material: Material
) -> ArtifactRef:
    """Sample, score, label and train, round after round; returns the model of the last one."""
    model = start
    earlier: dict[str, ArtifactRef] = {}
    for number in range(1, config.rounds + 1):
        at = f"{name}:round-{number}"
        inputs = {"model": model, "reward_model": material.reward, "dataset": material.dataset, **earlier}
        inputs |= reward_inputs(config.sampling.rewards, material.reward_models)
        rows = stage.named(f"{at}:rollouts", "rollouts", pin_rewards(config.rollouts(number)), inputs)
        if isinstance(config, RejectionSettings):
            earlier = {"earlier": rows} if config.keep == "all" else {}
            trained = start if config.train_from == "start" else model
            labelled = _labelled(at, config, stage, rows)
            model = stage.named(f"{at}:sft", "sft", config.sft(), {"base_model": trained, "dataset": labelled})
        else:
            assert isinstance(config, IteratedDpoConfig)
            training, inputs = config.preference(), {"sft_model": model, "dataset": _labelled(at, config, stage, rows)}
            inputs |= _reference(f"{at}:reference_logps", training, stage, inputs)
            model = stage.named(f"{at}:preference", "preference", training, inputs)
    return model


def _labelled(at: str, config: RoundsSettings, stage: Stages, rows: ArtifactRef) -> ArtifactRef:
    """Let a judge or people label a round's samples, where the candidate says so."""
    labelling = config.labelling(f"{at.replace(':', '-')}-{rows.id[:12]}")
    if labelling is None:
        return rows
    return stage.named(f"{at}:labels", "labels", pin_labels(labelling), {"rollouts": rows})
