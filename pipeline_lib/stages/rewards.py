"""Reward sources of a training stage: their files pinned when a run is planned, their models fetched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.schema import ArtifactRef, Record
from pipeline_lib.stages.contract import Inputs, StageContext
from pipeline_lib.stages.reward_models import open_reward_model
from pipeline_lib.training.reward_set import MAIN_REWARD_MODEL, RewardSet
from pipeline_lib.training.settings import TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.models.scoring import Layout
    from pipeline_lib.text.chat_template import ChatTokenizer
    from pipeline_lib.training.critic import Critic, FrozenRewardModel
    from pipeline_lib.training.reference import Reference
    from pipeline_lib.training.reward_scoring import SetScorer
    from pipeline_lib.training.rewards.contract import Sample

ConfigT = TypeVar("ConfigT", bound=BaseModel)

INPUT_PREFIX = "reward_model:"
"""Before the name of a further reward model among a stage's inputs."""


def pin_rewards(config: ConfigT) -> ConfigT:
    """Return a stage's configuration with the sha256 of what its reward sources read, ready for the stage key.

    A configuration without reward sources comes back as it is.

    Raises:
        ConfigError: A file is not there, or a function is not allowed.
    """
    rewards: RewardSet | None = getattr(config, "rewards", None)
    if rewards is None:
        return config
    pinned = rewards.model_copy(update={"fingerprints": rewards.current_fingerprints()})
    return config.model_copy(update={"rewards": pinned})


def reward_inputs(rewards: RewardSet | None, models: dict[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """Return the further reward models that a set asks, as inputs of a stage.

    Args:
        rewards: The set, where there is one.
        models: The run's further reward models by name.

    Raises:
        ConfigError: The run has no reward model of a name.
    """
    names = [] if rewards is None else [name for name in rewards.reward_models if name != MAIN_REWARD_MODEL]
    missing = [name for name in names if name not in models]
    if missing:
        raise ConfigError(
            f"rewards ask a reward model {missing[0]!r}, which the run does not have",
            next_step=f"add reward_models.{missing[0]}, or name one of {', '.join([MAIN_REWARD_MODEL, *models])}",
        )
    return {INPUT_PREFIX + name: models[name] for name in names}


def open_scorer(
    rewards: RewardSet | None,
    records: Sequence[Record],
    inputs: Inputs,
    context: StageContext,
    *,
    settings: TrainingSettings,
    main: Critic | FrozenRewardModel | None,
    reference: Reference,
    layout: Layout,
    chat: ChatTokenizer,
) -> SetScorer | None:
    """Return what scores a stage's rollouts with a set of sources; None where it has none.

    Args:
        rewards: The set, where there is one.
        records: The rows that prompts are taken from.
        inputs: The stage's inputs; further reward models are `reward_model:<name>`.
        context: The stage's context.
        settings: Number format of further reward models, and the policy's adapter.
        main: Scores as the main reward model does; None where no source asks it.
        reference: The model that judges; its policy's base carries further reward models that were trained on it.
        layout: How responses become forwards.
        chat: The tokenizer.

    Raises:
        DataError: The files that sources read are not those that the run was planned with.
    """
    from pipeline_lib.training.reward_scoring import (  # noqa: PLC0415  (torch)
        ModelScores,
        PromptRow,
        ReferenceAnswers,
        SetScorer,
    )
    from pipeline_lib.training.reward_set import RewardScorer  # noqa: PLC0415
    from pipeline_lib.training.rewards.contract import Resources  # noqa: PLC0415

    if rewards is None:
        return None
    if rewards.current_fingerprints() != rewards.fingerprints:
        raise DataError(
            "the files that reward sources read are not what they were when the run was planned",
            next_step="run again: the run is planned anew with the files as they are",
        )
    models: dict[str, Critic | FrozenRewardModel] = {} if main is None else {MAIN_REWARD_MODEL: main}
    for name in inputs:
        if name.startswith(INPUT_PREFIX):
            model = open_reward_model(name, settings, reference.policy, inputs, context)
            models[name.removeprefix(INPUT_PREFIX)] = model

    def on_problem(sample: Sample, reason: str) -> None:
        context.log(f"{sample.where} is not scored: {reason}")

    resources = Resources(
        scores_of=ModelScores(models, layout, reference.policy.model.device, context.should_stop),
        answers_of=ReferenceAnswers(reference, chat, context.should_stop),
        should_stop=context.should_stop, on_problem=on_problem,
    )  # fmt: skip
    return SetScorer(RewardScorer(rewards, resources), {row.id: PromptRow.of(row) for row in records}, chat)
