"""Stage `conditional`: learn from good and bad answers alike, each behind words that say which it is.

Chain of Hindsight and conditional behaviour cloning. The model that comes out has a chat template
that puts the words for good answers into the generation prompt, so it is used like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline_lib.losses.cross_entropy import CrossEntropy
from pipeline_lib.schema import Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.pretraining import load_pretraining
from pipeline_lib.text.conditions import Conditioning, HindsightSettings
from pipeline_lib.training.pretraining_settings import PretrainingSettings
from pipeline_lib.training.settings import OfflineSettings

if TYPE_CHECKING:
    from pipeline_lib.text.cloning import ClassEncoder
    from pipeline_lib.text.encode import Encoder
    from pipeline_lib.text.hindsight import HindsightEncoder

VERSION = 4


class ConditionalConfig(OfflineSettings):
    """Fine-tuning of the SFT model on conditioned answers."""

    method: Literal["conditional"] = "conditional"
    """The method of this candidate."""
    conditioning: Conditioning = Field(HindsightSettings(), title="Conditioning")
    """What stands before good and bad answers: `{name: hindsight}` or `{name: classes}`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread evenly over the vocabulary."""
    pretraining: PretrainingSettings | None = None
    """Pretraining text that every step trains on too; null: none."""

    @property
    def loss(self) -> CrossEntropy:
        """The reduction of the method: a mean of row means, or weighted over all tokens or turns."""
        if isinstance(self.conditioning, HindsightSettings):
            return CrossEntropy(reduction="sample_mean", label_smoothing=self.label_smoothing)
        by_turn = self.conditioning.sequence_weight
        return CrossEntropy(reduction="turn_mean" if by_turn else "token_mean", label_smoothing=self.label_smoothing)


def run(config: ConditionalConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model` and `dataset`, output kind `model`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.plan import DataPlan  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.sft import SftRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_response_tokens)
    conditioned = conditioned_encoder(config, encoder)
    rows = stage.read_records(context, inputs["dataset"], Split.POLICY)
    trees = [tree for record in rows for tree in conditioned.trees(record)]
    stage.require_rows(trees, "answers of which it is known how good they are", Split.POLICY)
    truncated_frac = stage.require_whole_answers(trees, config, encoder, context)
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    recipe = SftRecipe(
        policy, DataPlan.of(trees, config), stage.layout_for(encoder, config, is_packed=policy.is_packed),
        objective=config.loss,
        pretraining=load_pretraining(config.pretraining, encoder.chat, context, seed=config.seed),
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="conditional")
    facts = {"dtype": str(dtype), "conditioning": config.conditioning.name, "rows": len(recipe.plan.trees)}
    metrics = stage.write_supervised(policy, series, conditioned.chat, context, facts)
    conditioned.chat.write_template(context.workdir / "model")
    return StageOutput("model", context.workdir, {**metrics, "truncated_frac": truncated_frac})


def conditioned_encoder(config: ConditionalConfig, encoder: Encoder) -> HindsightEncoder | ClassEncoder:
    """Return what makes conditioned rows of records, and the template that the model is used with."""
    from pipeline_lib.text.cloning import ClassEncoder  # noqa: PLC0415  (transformers)
    from pipeline_lib.text.hindsight import HindsightEncoder  # noqa: PLC0415  (transformers)

    if isinstance(config.conditioning, HindsightSettings):
        return HindsightEncoder.of(encoder, config.conditioning)
    return ClassEncoder.of(encoder, config.conditioning)
