"""What the training stages share: fetching models and rows, running the loop, writing the output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pipeline_lib.errors import DataError, IntegrityError, InterruptedRunError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.models.scoring import Layout
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.stages.faults import kill_point
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.critic import Normalization
from pipeline_lib.training.guards import named_rows
from pipeline_lib.training.loop import LoopHooks, TrainingLoop, write_series
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.settings import OfflineSettings, TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel

if TYPE_CHECKING:
    from pipeline_lib.training.recipes.online import OwnSamples

SHOWN_ROWS = 8
"""Rows that a message names."""


def fetch_model(context: StageContext, ref: ArtifactRef, name: str) -> Path:
    """Fetch a model artifact's verified files beside the workdir; return its `model/` folder."""
    directory = context.workdir.parent / f"input-{name}"
    context.store.fetch(ref, directory)
    return directory / "model"


def read_records(context: StageContext, dataset: ArtifactRef, split: Split) -> Iterator[Record]:
    """Read the records of one split of a dataset artifact."""
    for line in context.store.read_lines(dataset, f"{split.value}.jsonl"):
        yield Record.model_validate_json(line)


def stop_as_asked(where: str) -> NoReturn:
    """End a stage that was asked to stop.

    Raises:
        InterruptedRunError: Always.
    """
    raise InterruptedRunError(
        f"stopped as asked {where}", next_step="run the same command again: it goes on from there"
    )


RowT = TypeVar("RowT")


def require_rows(records: list[RowT], what: str, split: Split) -> list[RowT]:
    """Refuse to go on without rows.

    Raises:
        DataError: The list is empty.
    """
    if not records:
        raise DataError(
            f"the split {split.value!r} holds no {what}",
            next_step=f"raise filter.split.fractions.{split.value}, or collect rows that are {what}",
        )
    return records


def require_prompt_texts(records: list[Record]) -> list[Record]:
    """Refuse prompts whose last turn says nothing.

    Raises:
        DataError: A prompt is empty; the rows are named.
    """
    empty = [record.id[:12] for record in records if not record.messages[-1].content.strip()]
    if empty:
        raise DataError(
            f"{len(empty)} prompts of the policy split are empty; rows: {', '.join(empty[:SHOWN_ROWS])}",
            next_step="keep the filter rule `empty`",
        )
    return records


def encoder_for(directory: Path, settings: TrainingSettings, *, max_response_tokens: int) -> Encoder:
    """Return the encoder of a model folder's tokenizer with a stage's length limits."""
    return Encoder(ChatTokenizer.load(directory), settings.max_prompt_tokens, max_response_tokens)


def require_whole_answers(
    trees: Sequence[Tree], config: OfflineSettings, encoder: Encoder, context: StageContext
) -> float:
    """Tell how many responses are cut, and refuse too many: what stands at their end would never be learnt.

    Args:
        trees: The rows that are trained on.
        config: Its `max_response_tokens` and `max_truncated_frac`.
        encoder: What has cut them.
        context: The stage's context.

    Returns:
        The share of responses that have lost their end.

    Raises:
        DataError: It is above `max_truncated_frac`; the rows are named.
    """
    responses = [(tree.record_id, ids) for tree in trees for ids in tree.response_ids]
    cut = [record_id for record_id, ids in responses if ids[-1:] != (encoder.chat.eos_id,)]
    if not cut:
        return 0.0
    frac = len(cut) / len(responses)
    told = (
        f"{len(cut):,} of {len(responses):,} responses ({frac:.1%}) are longer than max_response_tokens = "
        f"{config.max_response_tokens} and lose their end"
    )
    context.log(told)
    if frac > config.max_truncated_frac:
        rows = named_rows(list(dict.fromkeys(cut)))
        raise DataError(
            f"{told}; max_truncated_frac is {config.max_truncated_frac}; rows: {rows}",
            next_step="raise max_response_tokens, leave long rows out with the filter rule `length`, or raise "
            "max_truncated_frac",
        )
    return frac


def layout_for(encoder: Encoder, settings: TrainingSettings, *, is_packed: bool) -> Layout:
    """Return how a stage lays its rows out as forwards."""
    return Layout(is_packed, encoder.chat.pad_id, settings.tokens_per_batch)


def train(
    recipe: Recipe, settings: TrainingSettings, context: StageContext, *, metric_prefix: str
) -> list[dict[str, float]]:
    """Run the loop over a recipe and write `metrics.jsonl` into the output.

    Returns:
        Every step's figures, under names without prefix.
    """

    def on_step(step: int, figures: Mapping[str, float]) -> None:
        context.events.metrics(step, {f"{metric_prefix}/{name}": value for name, value in figures.items()})
        kill_point(metric_prefix, f"step-{step}")

    hooks = LoopHooks(
        on_step=on_step,
        on_progress=context.progress,
        should_stop=context.should_stop,
    )
    loop = TrainingLoop(
        recipe, settings, workdir=context.workdir.parent / "checkpoints",
        checkpoints=context.checkpoints, checkpoint_every_s=context.checkpoint_every_s, hooks=hooks,
        is_sharded=context.is_sharded,
    )  # fmt: skip
    series = loop.run()
    with (context.workdir / "metrics.jsonl").open("w", encoding="utf-8") as file:
        write_series(series, file)
    return series


def speeds_to(context: StageContext, *, metric_prefix: str) -> Callable[[int, Mapping[str, float]], None]:
    """Return what tells tokens a second with their step.

    They go beside the series: what differs from run to run must not be in the artifact.
    """

    def on_speed(step: int, speeds: Mapping[str, float]) -> None:
        context.events.metrics(step, {f"{metric_prefix}/{name}": value for name, value in speeds.items()})

    return on_speed


def write_online(recipe: OwnSamples[Any, Any], context: StageContext, facts: dict[str, Any], *, kl_weight: str) -> None:
    """Write what a training on own samples leaves: `samples.jsonl`, the model, `training.json`.

    Args:
        recipe: Trained.
        context: The stage's context.
        facts: As for `write_facts`; what the circuit breaker did is added.
        kl_weight: The setting that weighs the KL.

    Raises:
        DivergedError: The circuit breaker ended the training and nothing was better than its start.
    """
    rows = [json.dumps(json.loads(row), ensure_ascii=False, sort_keys=True) for row in recipe.samples]
    (context.workdir / "samples.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    if recipe.breaker is not None:
        recipe.breaker.require_gain(kl_weight=kl_weight)
        facts = facts | recipe.breaker.facts()
    recipe.policy.save(context.workdir / "model")
    write_facts(context.workdir, facts)


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
    """Write `training.json`: what was resolved at run time and belongs to the model's identity."""
    (directory / "training.json").write_bytes(canonical_json(facts))


def require_template(directory: Path, chat: ChatTokenizer) -> None:
    """Refuse a model whose chat template is not the one that it was trained with.

    Args:
        directory: Its `model/` folder, with `training.json` beside it where it was trained here.
        chat: The tokenizer of the folder.

    Raises:
        IntegrityError: The two differ, so that the model would be asked in a form it has never seen.
    """
    facts = directory.parent / "training.json"
    trained_with = read_json(facts).get("template_sha256") if facts.is_file() else None
    if trained_with not in (None, chat.template_sha256):
        raise IntegrityError(
            f"the chat template in {directory.name}/ has sha256 {chat.template_sha256[:12]}, the model was trained "
            f"with {trained_with[:12]}",
            next_step="train the model again; if that does not help, report this as a bug",
        )


def tail_mean(series: list[dict[str, float]], name: str) -> float:
    """Return the mean of a figure over the last tenth of the steps, at least one."""
    last = series[-max(1, len(series) // 10) :]
    return sum(row[name] for row in last) / len(last)


def normalization_of(model_directory: Path) -> Normalization:
    """Read the gain and bias that stand beside the folder of a reward model."""
    return Normalization(**read_json(model_directory.parent / "normalization.json"))


def write_supervised(
    policy: TrainedModel,
    series: list[dict[str, float]],
    chat: ChatTokenizer,
    context: StageContext,
    facts: dict[str, Any],
) -> dict[str, float]:
    """Write what a training on given texts leaves: the model and `training.json`.

    Args:
        policy: Trained.
        series: Every step's figures.
        chat: The template that the model is used with.
        context: The stage's context.
        facts: As for `write_facts`; the template's sha256 is added.

    Returns:
        The loss at the start and at the end.
    """
    policy.save(context.workdir / "model")
    write_facts(context.workdir, {**facts, "template_sha256": chat.template_sha256})
    return {
        "first_nll_per_token_nats": series[0]["nll_per_token_nats"],
        "last_nll_per_token_nats": tail_mean(series, "nll_per_token_nats"),
    }


def read_json(path: Path) -> Any:
    """Read a JSON file of a fetched artifact."""
    return json.loads(path.read_bytes())
