"""Stage `ppo`: fine-tune the SFT model against the reward model by PPO."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline_lib.errors import ConfigError, DivergedError
from pipeline_lib.models.settings import can_share
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.names import Name
from pipeline_lib.stages.pretraining import load_pretraining
from pipeline_lib.stages.rewards import open_scorer
from pipeline_lib.text.cropping import cropped
from pipeline_lib.training.reward_set import RewardSet
from pipeline_lib.training.settings import PpoSettings

if TYPE_CHECKING:
    from pipeline_lib.text.encode import Encoder, Tree
    from pipeline_lib.training.critic import Critic, FrozenRewardModel
    from pipeline_lib.training.recipes.ppo import PpoRecipe
    from pipeline_lib.training.trained_model import TrainedModel

VERSION = 2
HELDOUT = "heldout_reward_model"
"""Name of the input that measures and is not trained against."""


class PpoConfig(PpoSettings):
    """PPO on the prompts of the policy split."""

    method: Literal["ppo"] = "ppo"
    """The method of this candidate."""
    start_from: Name = "sft"
    """The model that is trained, and the reference: `sft`, `base`, or another candidate by name."""
    heldout_reward_model: Name | None = Field(None, title="Held-out reward model")
    """One of `reward_models` that measures every iteration and is not trained against; null: none."""
    rewards: RewardSet | None = None
    """Where scores come from, as a weighted sum; null: the reward model alone."""


def run(config: PpoConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `reward_model`, `dataset`; output `model`.

    Further inputs: `heldout_reward_model` where one is named, `reward_model:<name>` for each that `rewards` ask.

    Raises:
        DataError: A prompt is empty or longer than the model's context.
    """
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.ppo import PpoRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    reward_directory = stage.fetch_model(context, inputs["reward_model"], "reward_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_new_tokens)
    rows = list(stage.read_records(context, inputs["dataset"], Split.POLICY))
    records = policy_prompts(config, rows, context, encoder=encoder)
    prompts = _prompts(encoder, records)
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    critic = _critic(config, policy, reward_directory, inputs, context)

    def on_speed(step: int, speeds: Mapping[str, float]) -> None:
        # Beside the series: what differs from run to run must not be in the artifact.
        context.events.metrics(step, {f"ppo/{name}": value for name, value in speeds.items()})

    layout = stage.layout_for(encoder, config, is_packed=policy.is_packed and critic.value.is_packed)
    reference = Reference.of(policy)
    recipe = PpoRecipe(
        policy, reference, critic, stage.require_rows(prompts, "prompts", Split.POLICY),
        settings=config, layout=layout, chat=encoder.chat,
        should_stop=context.should_stop, on_text=context.log, on_speed=on_speed,
        heldout=_heldout(config, inputs, context),
        scorer=open_scorer(
            config.rewards, records, inputs, context, settings=config, main=critic, reference=reference,
            layout=layout, chat=encoder.chat,
        ),
        pretraining=load_pretraining(config.pretraining, encoder.chat, context, seed=config.seed),
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="ppo")
    _write_samples(context.workdir / "samples.jsonl", recipe.samples)
    _require_gain(recipe)
    policy.save(context.workdir / "model")
    facts = {"dtype": str(dtype), "template_sha256": encoder.chat.template_sha256, "rows": len(prompts)}
    stage.write_facts(context.workdir, facts | _breaker_facts(recipe))
    names = ("score", "ref_kl_nats", "kl_coef", "response_tokens", "finished_frac")
    return StageOutput("model", context.workdir, {f"last_{name}": stage.tail_mean(series, name) for name in names})


def _critic(
    config: PpoConfig, policy: TrainedModel, reward_directory: Path, inputs: Inputs, context: StageContext
) -> Critic:
    """Put the critic on the policy's base where the reward model was trained on that; else load its own."""
    from pipeline_lib.models.shared_base import ADAPTER_FOLDER, read_adapter  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.stages.reference_logps import weights_of  # noqa: PLC0415  (torch)
    from pipeline_lib.training.critic import Critic, Normalization  # noqa: PLC0415  (torch)

    normalization = Normalization(**stage.read_json(reward_directory.parent / "normalization.json"))
    stored = read_adapter(reward_directory.parent / ADAPTER_FOLDER)
    if stored is None:
        reason = "the reward model has no adapter of its own"
    elif not can_share(config.adapter):
        reason = "the policy has no plain LoRA adapter"
    elif stored.note.base_sha256 != weights_of(context, inputs["sft_model"]):
        reason = "the reward model was trained on other weights than those that the policy starts from"
    else:
        return Critic.on_policy(
            policy, stored, normalization, seed=config.seed + 1, value_init=config.value_init
        )  # fmt: skip
    context.log(f"{reason}: value function and reward model get a base of their own")
    return Critic(reward_directory, config, normalization, seed=config.seed + 1, value_init=config.value_init)


def heldout_input(config: PpoConfig, models: Mapping[str, ArtifactRef]) -> dict[str, ArtifactRef]:
    """Return the held-out reward model as an input of the stage, where one is named.

    Args:
        config: The stage's configuration.
        models: The run's further reward models by name.

    Raises:
        ConfigError: The run has no reward model of that name.
    """
    name = config.heldout_reward_model
    if name is None:
        return {}
    if name not in models:
        raise ConfigError(
            f"heldout_reward_model = {name!r}: the run has no such reward model",
            next_step=f"add reward_models.{name}, or name one of {', '.join(models) or 'them'}",
        )
    return {HELDOUT: models[name]}


def _heldout(config: PpoConfig, inputs: Inputs, context: StageContext) -> FrozenRewardModel | None:
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.critic import FrozenRewardModel, Normalization  # noqa: PLC0415  (torch)

    if config.heldout_reward_model is None:
        return None
    directory = stage.fetch_model(context, inputs[HELDOUT], HELDOUT)
    normalization = Normalization(**stage.read_json(directory.parent / "normalization.json"))
    return FrozenRewardModel(directory, normalization, settings=config)


def _require_gain(recipe: PpoRecipe) -> None:
    """Stop where the circuit breaker ended the training and nothing was better than its start.

    Raises:
        DivergedError: With the breaches.
    """
    breaker = recipe.breaker
    if breaker is not None and breaker.has_ended and breaker.best_is_start:
        raise DivergedError(
            f"the circuit breaker ended the training, {'; '.join(breaker.breaches)}, and no iteration had a higher "
            "reward than the model that it started from",
            next_step="raise ppo.kl_coef, lower ppo.optimizer.learning_rate, or widen the limit of ppo.breaker",
        )


def _breaker_facts(recipe: PpoRecipe) -> dict[str, object]:
    """Tell which limits were breached, where any was."""
    breaker = recipe.breaker
    if breaker is None or not breaker.breaches:
        return {}
    return {"breaches": breaker.breaches, "best_iteration": breaker.best_iteration}


def policy_prompts(
    config: PpoConfig, records: list[Record], context: StageContext, *, encoder: Encoder
) -> list[Record]:
    """Return the records with their last user turn cut to whole sentences, where that is configured.

    Of too long a prompt the sentences that fit are kept, so that it still ends with a whole one.

    Args:
        config: The marks, and how long a prompt may be.
        records: The rows, in their order.
        context: Told how many are left out.
        encoder: Counts tokens.

    Raises:
        DataError: A prompt is empty; the rows are named.
    """
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    stage.require_prompt_texts(records)
    if config.prompt_start_text is None and config.prompt_end_text is None:
        return records
    whole = replace(encoder, max_prompt_tokens=sys.maxsize)

    def with_text(record: Record, text: str) -> Record:
        messages = (*record.messages[:-1], record.messages[-1].model_copy(update={"content": text}))
        return record.model_copy(update={"messages": messages})

    def fits(record: Record, text: str) -> bool:
        ids, _ = whole.prompt(with_text(record, text).messages, where=f"row {record.id[:12]}")
        return len(ids) <= config.max_prompt_tokens

    kept = []
    for record in records:
        text = cropped(
            record.messages[-1].content, start_text=config.prompt_start_text, end_text=config.prompt_end_text,
            fits=partial(fits, record),
        )  # fmt: skip
        if text is not None:
            kept.append(with_text(record, text))
    context.log(f"{len(records) - len(kept)} of {len(records)} prompts have no whole sentence and are left out")
    return kept


def _prompts(encoder: Encoder, records: list[Record]) -> list[Tree]:
    """Encode every different prompt once, without its responses."""
    different = {record.messages: record for record in reversed(records)}
    first_seen = [record for record in records if different.get(record.messages) is record]
    return [encoder.tree(record.model_copy(update={"responses": (), "ranks": ()})) for record in first_seen]


def _write_samples(path: Path, samples: list[str]) -> None:
    rows = [json.dumps(json.loads(row), ensure_ascii=False, sort_keys=True) for row in samples]
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
