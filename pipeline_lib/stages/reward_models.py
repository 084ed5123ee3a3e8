"""The reward models of a stage that trains on own samples: adapters on the policy's base wherever they can be.

A reward model that was trained with plain LoRA on the very weights that the policy starts from is put
on the policy's frozen base; any other is loaded whole, and one line says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.settings import can_share
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.contract import Inputs, StageContext
from pipeline_lib.stages.names import Name
from pipeline_lib.training.reward_set import RewardSet
from pipeline_lib.training.settings import PpoSettings, TrainingSettings
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline_lib.models.shared_base import StoredAdapter
    from pipeline_lib.training.critic import Critic, FrozenRewardModel, Normalization
    from pipeline_lib.training.trained_model import TrainedModel

MAIN, HELDOUT = "reward_model", "heldout_reward_model"
"""Names of the inputs that a policy is trained against, and that measures alone."""


class ScoredSettings(Frozen):
    """Where the scores of a training on own samples come from, and what measures it alone."""

    heldout_reward_model: Name | None = Field(None, title="Held-out reward model")
    """One of `reward_models` that measures every iteration and is not trained against; null: none."""
    rewards: RewardSet | None = None
    """Where scores come from, as a weighted sum; null: the reward model alone."""

    @model_validator(mode="after")
    def _heldout_is_held_out(self) -> Self:
        name = self.heldout_reward_model
        if name is not None and self.rewards is not None and name in self.rewards.reward_models:
            raise ValueError(
                f"heldout_reward_model = {name!r} is among the rewards too: what is trained against is not held out"
            )
        return self


def heldout_input(
    config: ScoredSettings, models: Mapping[str, ArtifactRef], *, main: ArtifactRef
) -> dict[str, ArtifactRef]:
    """Return the held-out reward model as an input of the stage, where one is named.

    Args:
        config: The stage's configuration.
        models: The run's further reward models by name.
        main: The run's reward model.

    Raises:
        ConfigError: The run has no reward model of that name, or it is the one that is trained against.
    """
    name = config.heldout_reward_model
    if name is None:
        return {}
    if name not in models:
        raise ConfigError(
            f"heldout_reward_model = {name!r}: the run has no such reward model",
            next_step=f"add reward_models.{name}, or name one of {', '.join(models) or 'them'}",
        )
    if models[name] == main:
        raise ConfigError(
            f"heldout_reward_model = {name!r}: it is the very model that the policy is trained against",
            next_step=f"train it on other rows, e.g. reward_models.{name}.rows: {{tags: ...}}, or with another seed",
        )
    return {HELDOUT: models[name]}


def open_critic(config: PpoSettings, policy: TrainedModel, inputs: Inputs, context: StageContext) -> Critic:
    """Put PPO's critic on the policy's base where the reward model was trained on that; else load its own."""
    from pipeline_lib.training.critic import Critic  # noqa: PLC0415  (torch)

    directory, normalization, stored = _fetched(inputs[MAIN], MAIN, context)
    why = _why_apart(stored, config, policy, inputs, context)
    if stored is not None and why is None:
        return Critic.on_policy(policy, stored, normalization, seed=config.seed + 1, value_init=config.value_init)
    context.log(f"{why}: value function and reward model get a base of their own")
    return Critic(directory, config, normalization, seed=config.seed + 1, value_init=config.value_init)


def open_reward_model(
    name: str, settings: TrainingSettings, policy: TrainedModel, inputs: Inputs, context: StageContext
) -> FrozenRewardModel:
    """Put a reward model on the policy's base where it was trained on that; else load its own.

    Args:
        name: Of the input.
        settings: Number format and adapter of the policy.
        policy: What is trained.
        inputs: The stage's inputs.
        context: The stage's context.

    Raises:
        IntegrityError: Its adapter does not go on the policy's layers.
    """
    from pipeline_lib.training.critic import FrozenRewardModel  # noqa: PLC0415  (torch)

    directory, normalization, stored = _fetched(inputs[name], name, context)
    why = _why_apart(stored, settings, policy, inputs, context)
    if stored is not None and why is None:
        return FrozenRewardModel.on_policy(policy, stored, normalization)
    context.log(f"{why}: {name} gets a base of its own")
    return FrozenRewardModel(directory, normalization, settings=settings)


def open_heldout(
    settings: TrainingSettings, policy: TrainedModel, inputs: Inputs, context: StageContext
) -> FrozenRewardModel | None:
    """Return the model that measures alone, where the stage has one."""
    return open_reward_model(HELDOUT, settings, policy, inputs, context) if HELDOUT in inputs else None


def _fetched(ref: ArtifactRef, name: str, context: StageContext) -> tuple[Path, Normalization, StoredAdapter | None]:
    """Fetch a reward model: its folder, its gain and bias, and its adapter where it has one."""
    from pipeline_lib.models.shared_base import ADAPTER_FOLDER, read_adapter  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, ref, name.replace(":", "-"))
    normalization = stage.normalization_of(directory)
    return directory, normalization, read_adapter(directory.parent / ADAPTER_FOLDER)


def _why_apart(
    stored: StoredAdapter | None,
    settings: TrainingSettings,
    policy: TrainedModel,
    inputs: Inputs,
    context: StageContext,
) -> str | None:
    """Return why a reward model cannot stand on the policy's base; None where it can."""
    from pipeline_lib.stages.reference_logps import weights_of  # noqa: PLC0415  (torch)

    if stored is None:
        return "the reward model has no adapter of its own"
    if policy.adapter is None or not can_share(settings.adapter):
        return "the policy has no plain LoRA adapter"
    if stored.note.base_sha256 != weights_of(context, inputs["sft_model"]):
        return "the reward model was trained on other weights than those that the policy starts from"
    return None
