"""Stage `dpo`: preference fine-tuning on pairs, the formula a plug-in of `losses/preference`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.registry import PluginSpec
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.training.settings import OfflineSettings

VERSION = 1


def _complete(spec: PluginSpec) -> PluginSpec:
    """Check the loss and write its defaults out, so that the stage key sees them."""
    plugin: BaseModel = PREFERENCE_LOSSES.build(spec)
    return {"name": spec["name"], **plugin.model_dump(mode="json")}


class PreferenceConfig(OfflineSettings):
    """Preference fine-tuning of the SFT model, which is its own reference."""

    loss: Annotated[PluginSpec, AfterValidator(_complete)] = Field({"name": "dpo"}, validate_default=True)
    """The objective and its parameters; `prefline list losses` prints them all."""


def run(config: PreferenceConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `dataset`, `reference_logps`; output kind `model`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.stages.reference_logps import policy_pairs  # noqa: PLC0415  (torch)
    from pipeline_lib.training.plan import DataPlan  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.preference import PreferenceRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_response_tokens)
    trees = policy_pairs(context, inputs["dataset"], encoder)
    reference: dict[str, Any] = context.store.read_json(inputs["reference_logps"], "logps.json")
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    recipe = PreferenceRecipe(
        policy, DataPlan.of(trees, config), stage.layout_for(encoder, config, is_packed=policy.is_packed),
        objective=PREFERENCE_LOSSES.build(config.loss),
        reference={key: tuple(value) for key, value in reference.items()},
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="dpo")
    policy.save(context.workdir / "model")
    facts = {
        "dtype": str(dtype),
        "template_sha256": encoder.chat.template_sha256,
        "rows": len(recipe.plan.trees),
    }
    stage.write_facts(context.workdir, facts)
    names = ("loss", "accuracy_frac", "log_ratio_margin_nats")
    return StageOutput("model", context.workdir, {f"last_{name}": stage.tail_mean(series, name) for name in names})
