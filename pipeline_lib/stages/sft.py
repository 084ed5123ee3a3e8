"""Stage `sft`: supervised fine-tuning of the base model on demonstrations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.cross_entropy import CrossEntropy
from pipeline_lib.schema import ArtifactRef, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.lineage import artifact_named
from pipeline_lib.stages.pretraining import load_pretraining
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.pretraining_settings import PretrainingSettings
from pipeline_lib.training.settings import OfflineSettings, SelectionSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline_lib.text.chat_template import ChatTokenizer
    from pipeline_lib.text.encode import Tree
    from pipeline_lib.training.selection import AnswerScore

VERSION = 4

LAST_ROUND = "last_round"
"""Stands for the reward model of the round before."""


class SftConfig(OfflineSettings):
    """Supervised fine-tuning."""

    train_on: Literal["assistant_turns", "last_assistant_turn"] = "assistant_turns"
    """Which turns of a dialogue count in the loss."""
    loss: CrossEntropy = CrossEntropy()
    """How tokens are averaged, and label smoothing."""
    kl_coef: float = Field(0.0, ge=0, title="KL coefficient")
    """Weight of the KL from the model to the one that training began with, nats a token; 0: none."""
    pretraining: PretrainingSettings | None = None
    """Pretraining text that every step trains on too; null: none."""
    residual_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what each sub-layer adds to the residual stream that is dropped while training; InstructGPT: 0.2."""
    select_by: SelectionSettings | None = Field(None, title="Select by")
    """Keep the weights whose answers a reward model scores best, as InstructGPT does; null: by the held-out loss."""

    @model_validator(mode="after")
    def _selects_among_measurements(self) -> Self:
        if self.select_by is not None and self.early_stopping is None:
            raise ValueError("select_by chooses among the measurements of early_stopping, which is null: set it")
        return self


def selection_input(config: SftConfig, store: ArtifactStore, last_round: ArtifactRef | None) -> dict[str, ArtifactRef]:
    """Return the reward model that SFT models are chosen by, as an input of the stage; empty where there is none.

    Args:
        config: The stage's configuration, which names it.
        store: Where it is.
        last_round: The reward model of the round before; None in the first round.

    Raises:
        ConfigError: The name belongs to no artifact, or to none that is a reward model.
    """
    if config.select_by is None:
        return {}
    name = config.select_by.reward_model
    if name == LAST_ROUND:
        return {} if last_round is None else {"reward_model": last_round}
    found = artifact_named(store, name)
    if found.kind != "reward_model":
        raise ConfigError(
            f"sft.select_by.reward_model = {name!r} is the artifact {found}, not a reward model",
            next_step="name one that a stage `reward` made: the report of its run shows the id",
        )
    return {"reward_model": found}


def run(config: SftConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `base_model`, `dataset`, perhaps `reward_model`; output kind `model`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.plan import DataPlan  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.sft import KlPenalty, SftRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["base_model"], "base_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_response_tokens)
    records = [
        record for record in stage.read_records(context, inputs["dataset"], Split.SFT) if record.kind == "demonstration"
    ]
    trees = [
        replace(encoder.tree(record), weight=record.weight)
        for record in stage.require_rows(records, "demonstrations", Split.SFT)
    ]
    if config.train_on == "last_assistant_turn":
        trees = [replace(tree, prompt_counts=(False,) * len(tree.prompt_ids)) for tree in trees]
    truncated_frac = stage.require_whole_answers(trees, config, encoder, context)
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    layout = stage.layout_for(encoder, config, is_packed=policy.is_packed)
    plan = DataPlan.of(trees, config)
    recipe = SftRecipe(
        policy, plan, layout, objective=config.loss,
        kl=KlPenalty(config.kl_coef, Reference.of(policy)) if config.kl_coef else None,
        pretraining=load_pretraining(config.pretraining, encoder.chat, context, seed=config.seed),
        residual_dropout=config.residual_dropout,
        selection=_selection(config, inputs, context, held_out=plan.held_out, chat=encoder.chat),
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="sft")
    facts = {"dtype": str(dtype), "rows": len(plan.trees)}
    metrics = stage.write_supervised(policy, series, encoder.chat, context, facts)
    held_out_scores = [row["held_out_score"] for row in series if "held_out_score" in row]
    if held_out_scores:
        metrics["best_held_out_score"] = max(held_out_scores)
    return StageOutput("model", context.workdir, {**metrics, "truncated_frac": truncated_frac})


def _selection(
    config: SftConfig, inputs: Inputs, context: StageContext, *, held_out: Sequence[Tree], chat: ChatTokenizer
) -> AnswerScore | None:
    """Load the reward model that the weights are chosen by; None where the held-out loss decides.

    Raises:
        ConfigError: It reads other tokens, or another chat template, than the model that is trained.
    """
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.text.chat_template import ChatTokenizer  # noqa: PLC0415  (transformers)
    from pipeline_lib.training.selection import AnswerScore  # noqa: PLC0415  (torch)

    if config.select_by is None:
        return None
    if "reward_model" not in inputs:
        context.log("there is no reward model of a round before: the weights are chosen by the held-out loss")
        return None
    directory = stage.fetch_model(context, inputs["reward_model"], "reward_model")
    theirs = ChatTokenizer.load(directory)
    if (theirs.template_sha256, theirs.tokenizer.get_vocab()) != (chat.template_sha256, chat.tokenizer.get_vocab()):
        raise ConfigError(
            f"the reward model {inputs['reward_model']} of sft.select_by was trained with another tokenizer or chat "
            "template than the model that is trained has",
            next_step="name a reward model of the same base model and model.chat_template",
        )
    return AnswerScore.load(
        directory, stage.normalization_of(directory), held_out,
        selection=config.select_by, training=config, chat=chat,
    )  # fmt: skip
