"""Stage `sft`: supervised fine-tuning of the base model on demonstrations."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from pipeline_lib.losses.cross_entropy import CrossEntropy
from pipeline_lib.schema import Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.pretraining import load_pretraining
from pipeline_lib.training.pretraining_settings import PretrainingSettings
from pipeline_lib.training.settings import OfflineSettings

VERSION = 2


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


def run(config: SftConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `base_model` and `dataset`, output kind `model`."""
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
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    layout = stage.layout_for(encoder, config, is_packed=policy.is_packed)
    recipe = SftRecipe(
        policy, DataPlan.of(trees, config), layout, objective=config.loss,
        kl=KlPenalty(config.kl_coef, Reference.of(policy)) if config.kl_coef else None,
        pretraining=load_pretraining(config.pretraining, encoder.chat, context, seed=config.seed),
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="sft")
    policy.save(context.workdir / "model")
    facts = {
        "dtype": str(dtype),
        "template_sha256": encoder.chat.template_sha256,
        "rows": len(recipe.plan.trees),
    }
    stage.write_facts(context.workdir, facts)
    metrics = {
        "first_nll_per_token_nats": series[0]["nll_per_token_nats"],
        "last_nll_per_token_nats": stage.tail_mean(series, "nll_per_token_nats"),
    }
    return StageOutput("model", context.workdir, dict(metrics))
