"""Stage `reward`: a reward model on the SFT model's backbone, and its report card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from pipeline_lib.data.selection import RowSelection
from pipeline_lib.errors import DataError
from pipeline_lib.hashing import canonical_json, derive_seed
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.reward.safety import Safety
from pipeline_lib.models.settings import LoraSettings, can_share
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.training.settings import OfflineSettings, TrainingSettings

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline_lib.evaluation.report_card import ReportCard
    from pipeline_lib.models.scoring import Layout
    from pipeline_lib.text.encode import Encoder, Tree
    from pipeline_lib.training.trained_model import TrainedModel

VERSION = 5


class RewardConfig(OfflineSettings):
    """Reward-model training."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        **TrainingSettings.renamed_keys, "centring": "'loss' (name: bradley_terry, centring: …)",
    }  # fmt: skip

    loss: Annotated[PluginSpec, AfterValidator(REWARD_LOSSES.complete)] = Field(
        {"name": "bradley_terry", "centring": 0.01}, validate_default=True
    )
    """The objective and its parameters; `prefline list reward-losses` prints them all."""
    safety: Safety | None = Field(None, title="Safety")
    """For a safety model: it also learns which responses are safe, as its rows' tags say; null: it does not."""
    rows: RowSelection = RowSelection()
    """Which comparisons it learns from, and is tested on: a helpful and a safety model have their own."""
    max_test_rows: int = Field(256, ge=1)
    """Held-out comparisons that the report card is made on."""
    normalize_on: Literal["held_out", "reference_samples", "demonstrations"] = "held_out"
    """Whose scores have mean 0 and standard deviation 1: the held-out responses', or those of samples of
    the SFT model (Ziegler et al. 2019), which then scale the head before training too. demonstrations:
    those of the SFT split have mean 0, and no score is scaled (InstructGPT)."""
    normalize_samples: int = Field(256, ge=2)
    """Prompts of the policy's split that the SFT model answers for it, or demonstrations."""
    normalize_tokens: int = Field(64, ge=1)
    """Tokens of such an answer, at most."""


def run(config: RewardConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model` and `dataset`, output kind `reward_model`."""
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.plan import DataPlan  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.reward import Label, RewardRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.score_invariance import check_scores_do_not_move  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_response_tokens)
    comparisons = _comparisons(context, inputs, Split.REWARD)
    train_rows = stage.require_rows(config.rows.mixed(comparisons, seed=config.seed), _what(config), Split.REWARD)
    held_out = config.rows.own(_comparisons(context, inputs, Split.REWARD_TEST))
    test_rows = stage.require_rows(held_out, _what(config), Split.REWARD_TEST)[: config.max_test_rows]
    train_trees = [encoder.tree(row) for row in train_rows]
    truncated_frac = stage.require_whole_answers(train_trees, config, encoder, context)
    samples = _reference_samples(config, inputs, context, directory, encoder)
    demonstrations = _demonstrations(config, inputs, context, encoder)
    trained, layout = _model(config, directory, encoder, samples)
    labels = {row.id: Label.of(row, config.safety) for row in train_rows}
    if config.safety is not None and not any(label.is_safe for label in labels.values()):
        raise _nothing_is_labelled(config.safety)
    recipe = RewardRecipe(
        trained, DataPlan.of(train_trees, config), layout,
        objective=REWARD_LOSSES.build(config.loss), labels=labels, safety=config.safety,
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="reward")
    context.progress(1.0, f"measuring on {len(test_rows)} held-out comparisons")
    test_trees = [encoder.tree(row) for row in test_rows]
    dtype = dtype_for(config)
    moved = check_scores_do_not_move(trained.model, test_trees, layout, dtype=dtype)
    card, scores = _measure(trained, layout, test_rows, test_trees)
    scale = _scale(trained, layout, samples, demonstrations, scores)
    figures = {**card.figures, **{f"normalization_{name}": value for name, value in scale.items()}}
    tables = card.model_dump(mode="json", exclude={"figures"})
    (context.workdir / "report_card.json").write_bytes(canonical_json({**figures, **tables, "scores_moved": moved}))
    (context.workdir / "normalization.json").write_bytes(canonical_json(scale))
    _keep_adapter(config, trained, inputs, context)
    trained.save(context.workdir / "model")
    facts = {
        "dtype": str(dtype),
        "template_sha256": encoder.chat.template_sha256,
        "rows": len(recipe.plan.trees),
        "loss": config.loss["name"],
        "mixed_in_frac": 1 - len(config.rows.own(train_rows)) / len(train_rows),
    }
    stage.write_facts(context.workdir, facts)
    figures |= {"last_loss": stage.tail_mean(series, "loss"), "truncated_frac": truncated_frac}
    return StageOutput("reward_model", context.workdir, figures)


def _nothing_is_labelled(safety: Safety) -> DataError:
    tags = (*safety.best_safe_tags, *safety.all_safe_tags, *safety.none_safe_tags)
    return DataError(
        f"reward.safety learns what is safe, and none of the comparisons has a tag that says so: {', '.join(tags)}",
        next_step="tag the rows, name their tags in reward.safety, or set reward.safety: null",
    )


def _keep_adapter(config: RewardConfig, trained: TrainedModel, inputs: Inputs, context: StageContext) -> None:
    """Write the adapter as it was trained, with its head and what it sits on: PPO can share one base with it."""
    from peft import PeftModel  # noqa: PLC0415  (torch)

    from pipeline_lib.models.heads import head_of  # noqa: PLC0415  (torch)
    from pipeline_lib.models.shared_base import ADAPTER_FOLDER, write_adapter  # noqa: PLC0415  (torch)
    from pipeline_lib.stages.reference_logps import weights_of  # noqa: PLC0415  (torch)

    if not (can_share(config.adapter) and isinstance(trained.adapter, PeftModel)):
        return
    assert isinstance(config.adapter, LoraSettings)
    is_kept = write_adapter(
        trained.adapter, config.adapter, head_of(trained.model).weight,
        base_sha256=weights_of(context, inputs["sft_model"]), directory=context.workdir / ADAPTER_FOLDER,
    )  # fmt: skip
    if not is_kept:
        context.log("a layer outside of the backbone is adapted: PPO will load this reward model whole")


def _what(config: RewardConfig) -> str:
    return f"comparisons tagged {' or '.join(config.rows.tags)}" if config.rows.tags else "comparisons"


def _comparisons(context: StageContext, inputs: Inputs, split: Split) -> list[Record]:
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    return [
        row
        for row in stage.read_records(context, inputs["dataset"], split)
        if row.kind == "comparison" and len(set(row.ranks)) > 1  # nothing but ties has no pair
    ]


def _model(config: RewardConfig, directory: Path, encoder: Encoder, samples: list[Tree]) -> tuple[TrainedModel, Layout]:
    """Load the backbone with a new head, made ready for training; with samples, at unit scale on them."""
    import torch  # noqa: PLC0415

    from pipeline_lib.models.heads import head_of, init_head, load_scalar_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    model = load_scalar_model(directory, dtype=dtype_for(config))
    init_head(model, seed=derive_seed(config.seed, "reward head"))
    trained = prepare(model, directory, config, seed=config.seed)
    head = head_of(trained.model).float().requires_grad_(requires_grad=True)
    layout = stage.layout_for(encoder, config, is_packed=trained.is_packed)
    if samples:
        # The bias of Ziegler's first normalisation would not change a difference of two scores.
        with torch.no_grad():
            head.weight.mul_(normalization_of(_scores(trained, samples, layout))["gain"])
    return trained, layout


def _reference_samples(
    config: RewardConfig, inputs: Inputs, context: StageContext, directory: Path, encoder: Encoder
) -> list[Tree]:
    """Let the SFT model answer prompts of the policy's split; empty where nothing is normalised on them."""
    if config.normalize_on != "reference_samples":
        return []
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.precision import default_device, resolve_dtype  # noqa: PLC0415  (torch)
    from pipeline_lib.models.sampling import SamplingSettings, sample  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.text.encode import Tree  # noqa: PLC0415  (tokenizers)

    records = stage.require_rows(
        list(stage.read_records(context, inputs["dataset"], Split.POLICY)), "prompts", Split.POLICY
    )
    records.sort(key=lambda row: derive_seed(config.seed, "normalise", row.id))
    chosen = list({row.messages: row for row in reversed(records)}.values())[-config.normalize_samples :]
    prompts = [encoder.prompt(row.messages, where=f"row {row.id[:12]}")[0] for row in chosen]
    model = load_causal_model(directory, dtype=resolve_dtype(config.precision)).to(default_device())
    drawn = sample(
        model, prompts, SamplingSettings(max_new_tokens=config.normalize_tokens),
        eos_id=encoder.chat.eos_id, pad_id=encoder.chat.pad_id, seed=derive_seed(config.seed, "reference samples"),
        on_batch=lambda done: context.progress(0.0, f"sampled {done}/{len(prompts)} responses of the SFT model"),
    )  # fmt: skip
    return [
        Tree(row.id, tuple(prompt), (one.ids,), (False,) * len(prompt))
        for row, prompt, one in zip(chosen, prompts, drawn, strict=True)
    ]


def _demonstrations(config: RewardConfig, inputs: Inputs, context: StageContext, encoder: Encoder) -> list[Tree]:
    """Return demonstrations of the SFT split; empty where nothing is normalised on them."""
    if config.normalize_on != "demonstrations":
        return []
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    rows = [row for row in stage.read_records(context, inputs["dataset"], Split.SFT) if row.kind == "demonstration"]
    chosen = stage.require_rows(rows, "demonstrations", Split.SFT)[: config.normalize_samples]
    return [encoder.tree(row) for row in chosen]


def _scale(
    trained: TrainedModel, layout: Layout, samples: list[Tree], demonstrations: list[Tree], held_out: list[float]
) -> dict[str, float]:
    """Return gain and bias by whatever the scores are normalised on."""
    if not demonstrations:
        return normalization_of(_scores(trained, samples, layout) if samples else held_out)
    import torch  # noqa: PLC0415

    from pipeline_lib.losses.reward.normalization import mean_to_zero  # noqa: PLC0415  (torch)

    gain, bias = mean_to_zero(torch.tensor(_scores(trained, demonstrations, layout), dtype=torch.float64))
    return {"gain": gain, "bias": bias}


def _scores(trained: TrainedModel, trees: list[Tree], layout: Layout) -> list[float]:
    from pipeline_lib.models.scoring import response_scores  # noqa: PLC0415  (torch)

    return [score for row in response_scores(trained.model, trees, layout).values() for score in row]


def _measure(
    trained: TrainedModel, layout: Layout, rows: list[Record], trees: list[Tree]
) -> tuple[ReportCard, list[float]]:
    """Make the report card; return the held-out scores too."""
    from pipeline_lib.evaluation.report_card import ScoredRow, report_card  # noqa: PLC0415  (numpy)
    from pipeline_lib.evaluation.stats import Bootstrap  # noqa: PLC0415  (numpy)
    from pipeline_lib.models.scoring import response_scores  # noqa: PLC0415  (torch)

    by_row = response_scores(trained.model, trees, layout)
    scored = [
        ScoredRow(
            scores=tuple(by_row[row.id]), ranks=row.ranks, strength=row.strength,
            lengths_words=tuple(len(response.content.split()) for response in row.responses),
        )
        for row in rows
    ]  # fmt: skip
    return report_card(scored, Bootstrap()), [score for row in scored for score in row.scores]


def normalization_of(scores: list[float]) -> dict[str, float]:
    """Return gain and bias that give scores mean 0 and standard deviation 1: normalised = gain * raw + bias.

    Where all scores are equal the gain is 1.
    """
    import torch  # noqa: PLC0415

    from pipeline_lib.losses.reward.normalization import normalization  # noqa: PLC0415  (torch)

    if min(scores) == max(scores):
        return {"gain": 1.0, "bias": -scores[0]}
    gain, bias = normalization(torch.tensor(scores, dtype=torch.float64))
    return {"gain": gain, "bias": bias}
