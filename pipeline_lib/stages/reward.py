"""Stage `reward`: a Bradley-Terry reward model on the SFT model's backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline_lib.hashing import canonical_json, derive_seed
from pipeline_lib.schema import Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.training.settings import OfflineSettings

if TYPE_CHECKING:
    from pipeline_lib.models.scoring import Layout
    from pipeline_lib.text.encode import Encoder
    from pipeline_lib.training.trained_model import TrainedModel

VERSION = 1


class RewardConfig(OfflineSettings):
    """Reward-model training."""

    centring: float = Field(0.01, ge=0)
    """Weight of the squared sum of a pair's scores, which keeps scores around 0."""
    max_test_rows: int = Field(256, ge=1)
    """Held-out comparisons that accuracy, margin and normalisation are measured on."""


def run(config: RewardConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model` and `dataset`, output kind `reward_model`."""
    from pipeline_lib.models.heads import head_of, init_head, load_scalar_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.plan import DataPlan  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.reward import RewardRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_response_tokens)
    train_rows = _comparisons(context, inputs, Split.REWARD)
    test_rows = _comparisons(context, inputs, Split.REWARD_TEST)[: config.max_test_rows]
    dtype = dtype_for(config)
    model = load_scalar_model(directory, dtype=dtype)
    init_head(model, seed=derive_seed(config.seed, "reward head"))
    trained = prepare(model, directory, config, seed=config.seed)
    head_of(trained.model).float().requires_grad_(requires_grad=True)
    layout = stage.layout_for(encoder, config, is_packed=trained.is_packed)
    recipe = RewardRecipe(
        trained, DataPlan.of([encoder.tree(row) for row in train_rows], config), layout,
        ranks={row.id: row.ranks for row in train_rows}, centring=config.centring,
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="reward")
    context.progress(1.0, f"measuring on {len(test_rows)} held-out comparisons")
    report = _measure(trained, encoder, layout, test_rows)
    (context.workdir / "report_card.json").write_bytes(canonical_json(report))
    (context.workdir / "normalization.json").write_bytes(
        canonical_json({"gain": report["normalization_gain"], "bias": report["normalization_bias"]})
    )
    trained.save(context.workdir / "model")
    stage.write_facts(
        context.workdir,
        {
            "dtype": str(dtype),
            "template_sha256": encoder.chat.template_sha256,
            "rows": len(recipe.plan.trees),
        },
    )
    metrics: dict[str, float | None] = dict(report)
    return StageOutput("reward_model", context.workdir, metrics | {"last_loss": stage.tail_mean(series, "loss")})


def _comparisons(context: StageContext, inputs: Inputs, split: Split) -> list[Record]:
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    rows = [
        row
        for row in stage.read_records(context, inputs["dataset"], split)
        if row.kind == "comparison" and len(set(row.ranks)) > 1  # nothing but ties has no pair
    ]
    return stage.require_rows(rows, "comparisons", split)


def _measure(trained: TrainedModel, encoder: Encoder, layout: Layout, rows: list[Record]) -> dict[str, float]:
    """Measure accuracy, margin and length bias on held-out rows, and fit gain and bias.

    The normalisation makes the held-out responses' scores N(0, 1) (Ziegler et al. 2019, with the
    biased standard deviation): these are the texts that the policy starts out near.
    """
    from pipeline_lib.evaluation.stats import slope  # noqa: PLC0415  (numpy)
    from pipeline_lib.models.scoring import response_scores  # noqa: PLC0415  (torch)

    by_row = response_scores(trained.model, [encoder.tree(row) for row in rows], layout)
    margins, all_scores, lengths = [], [], []
    for row in rows:
        for place, score in enumerate(by_row[row.id]):
            all_scores.append(score)
            lengths.append(float(len(row.responses[place].content.split())))
            margins += [
                score - other for other, rank in zip(by_row[row.id], row.ranks, strict=True) if row.ranks[place] < rank
            ]
    mean = sum(all_scores) / len(all_scores)
    std = (sum((score - mean) ** 2 for score in all_scores) / len(all_scores)) ** 0.5
    gain = 1.0 / std if std > 0 else 1.0
    return {
        "test_accuracy_frac": sum(margin > 0 for margin in margins) / len(margins),
        "test_margin": sum(margins) / len(margins),
        "test_pairs": float(len(margins)),
        "length_bias_per_word": slope(lengths, all_scores),
        "normalization_gain": gain,
        "normalization_bias": -gain * mean,
    }
