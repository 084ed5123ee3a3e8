"""Stage `preference`: fine-tuning on preferences, the formula a plug-in of `losses/preference`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.names import Name
from pipeline_lib.stages.reference_logps import ReferenceLogpsConfig, weights_of
from pipeline_lib.training.settings import OfflineSettings

VERSION = 5


class PreferenceConfig(OfflineSettings):
    """Preference fine-tuning of the SFT model, which is its own reference."""

    method: Literal["preference"] = "preference"
    """The method of this candidate."""
    loss: Annotated[PluginSpec, AfterValidator(PREFERENCE_LOSSES.complete)] = Field(
        {"name": "dpo"}, validate_default=True
    )
    """The objective and its parameters; `prefline list losses` prints them all."""
    start_from: Name = "sft"
    """The model that is trained, and the reference: `sft`, another candidate by name, or `base` for losses
    that do without SFT, such as ORPO."""

    @property
    def objective(self) -> Any:
        """The loss."""
        return PREFERENCE_LOSSES.build(self.loss)

    @property
    def needs_reference(self) -> bool:
        """True where the loss compares with the reference's log-probabilities."""
        return bool(self.objective.needs_reference)

    def reference_logps(self) -> ReferenceLogpsConfig:
        """Return how the reference scores the rows that this stage trains on."""
        return ReferenceLogpsConfig(
            max_prompt_tokens=self.max_prompt_tokens, max_response_tokens=self.max_response_tokens,
            precision=self.model_precision, with_mismatched=self.objective.form == "unpaired",
        )  # fmt: skip


def run(config: PreferenceConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `dataset`, mostly `reference_logps`; output kind `model`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.plan import DataPlan  # noqa: PLC0415  (torch)
    from pipeline_lib.training.preferences import MISMATCHED, comparisons_of, mismatched  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.preference import PreferenceRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    objective = config.objective
    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_response_tokens)
    rows = comparisons_of(
        stage.read_records(context, inputs["dataset"], Split.POLICY), encoder, with_rated=objective.form == "unpaired"
    )
    stage.require_rows(list(rows.trees), "comparisons", Split.POLICY)
    truncated_frac = stage.require_whole_answers(rows.trees, config, encoder, context)
    reference = _reference(inputs, context) if config.needs_reference else None
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    others = mismatched(rows.trees) if objective.form == "unpaired" else []
    recipe = PreferenceRecipe(
        policy, DataPlan.of(rows.trees, config), stage.layout_for(encoder, config, is_packed=policy.is_packed),
        objective=objective, judgements=rows.judgements, reference=reference,
        mismatched={tree.record_id.removeprefix(MISMATCHED): tree for tree in others},
        reference_model=Reference.of(policy) if objective.needs_target_kl else None,
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="preference")
    policy.save(context.workdir / "model")
    facts = {
        "dtype": str(dtype),
        "template_sha256": encoder.chat.template_sha256,
        "rows": len(recipe.plan.trees),
        "loss": config.loss["name"],
    }
    stage.write_facts(context.workdir, facts)
    names = [name for name in ("loss", "accuracy_frac", "log_ratio_margin_nats") if name in series[-1]]
    metrics = {f"last_{name}": stage.tail_mean(series, name) for name in names}
    return StageOutput("model", context.workdir, {**metrics, "truncated_frac": truncated_frac})


def _reference(inputs: Inputs, context: StageContext) -> dict[str, tuple[float, ...]]:
    """Read the reference's log-probabilities, which must be those of the very model that is trained."""
    from pipeline_lib.training.reference import require_same_weights  # noqa: PLC0415  (torch)

    scored = context.store.manifest(inputs["reference_logps"]).inputs["sft_model"]
    require_same_weights(weights_of(context, inputs["sft_model"]), weights_of(context, scored))
    kept = context.store.read_json(inputs["reference_logps"], "logps.json")
    return {key: tuple(value) for key, value in kept.items()}
