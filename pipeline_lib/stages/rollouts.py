"""Stage `rollouts`: let a model answer prompts K times each, and let the reward model rank the answers.

The result is a data set like any other. Its policy split holds the ranked answers, for stages that
compare, its SFT split the best ones, for stages that imitate; all other splits are those of the
data set that the prompts come from. The answers are kept in parts, each under a key of what it
depends on, so a pass that was killed goes on after its last part.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.data.record_files import row_line, write_json
from pipeline_lib.errors import IntegrityError
from pipeline_lib.generation import GeneratorSpec
from pipeline_lib.hashing import canonical_json, derive_seed, sha256_json
from pipeline_lib.models.settings import Precision
from pipeline_lib.rl.best_of_n import expected_best, kl_nats
from pipeline_lib.schema import ArtifactRef, Author, Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.reference_logps import weights_of
from pipeline_lib.stages.rollout_rewards import rewarded, shaped
from pipeline_lib.stages.rollout_rows import (
    Compared,
    SampledPrompt,
    ScoredResponse,
    Selection,
    comparison,
    demonstrations,
    with_earlier,
)
from pipeline_lib.training.reward_set import RewardSet
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.stages.rollout_parts import Drawn, Sampler

VERSION = 3

_PROMPTS_PER_PART = 16
_PART = "rollouts_part"
SAMPLES = "samples.jsonl"
"""Every prompt with all its responses and their scores, in a data set of stage `rollouts`."""
_COPIED = (Split.REWARD, Split.REWARD_TEST, Split.GATE)


class RolloutSettings(Frozen):
    """How responses are sampled, the same in every round."""

    prompts: int | None = Field(None, ge=1)
    """Prompts of a round, further ones in each until all were used; null: all of the policy split."""
    samples_per_prompt: int = Field(4, ge=1)
    """Responses sampled for each prompt."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a response, at most."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the distribution that is drawn from."""
    batch_size: int = Field(32, ge=1)
    """Responses sampled at once; those of one prompt share its keys and values."""
    generator: GeneratorSpec = Field({"name": "continuous"}, validate_default=True)
    """What samples the responses, with its parameters; `prefline list generators` prints them."""
    missing_eos: Literal["keep", "replace", "penalty"] = "replace"
    """What happens to the score of a response that did not end by itself."""
    missing_eos_value: float = -1.0
    """The score that replaces it, or what is added to it."""
    rewards: RewardSet | None = None
    """Where scores come from, as a weighted sum; null: the reward model alone."""


class RolloutsConfig(RolloutSettings):
    """One round of sampling."""

    temperature: float = Field(1.0, ge=0)
    """Sampling temperature."""
    round: int = Field(1, ge=1)
    """Which round it is: each takes the next prompts, and draws anew."""
    select: Selection = "best_of_prompt"
    """Demonstrations: the best response of each prompt, or the best share of all responses."""
    top_frac: float = Field(0.2, gt=0, le=1)
    """The share, of `top_share`."""
    compared: Compared = "all"
    """Comparisons: all responses of a prompt, or its best and its worst."""
    max_prompt_tokens: int = Field(512, ge=8)
    """Longer prompts lose their beginning."""
    precision: Precision = "auto"
    """Number format of the models."""
    seed: int = Field(0, ge=0)
    """Seed of the order of prompts and of the responses."""


def run(config: RolloutsConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Sample; inputs `model`, `reward_model`, `dataset`, optionally `earlier`; output kind `dataset`.

    Further inputs: `reward_model:<name>` for each reward model that `rewards` ask.
    With `earlier`, the rollouts of the round before, rows are made of all rounds' responses.
    """
    from pipeline_lib.stages.rollout_parts import Sampler  # noqa: PLC0415  (torch)
    from pipeline_lib.stages.training_stage import read_records, require_rows, stop_as_asked  # noqa: PLC0415  (torch)

    earlier = list(_earlier(inputs, context))
    records = list(read_records(context, inputs["dataset"], Split.POLICY))
    prompts = prompts_of_round(records, config)
    require_rows(prompts, "prompts", Split.POLICY)
    sampler = Sampler.open(config, inputs, context)
    author = Author(
        kind="model", name=str(inputs["model"]),
        sampling={"temperature": config.temperature, "top_p": config.top_p, "max_new_tokens": config.max_new_tokens,
                  "seed": config.seed, "round": config.round},
    )  # fmt: skip
    new: list[SampledPrompt] = []
    all_drawn: list[list[Drawn]] = []
    num_found = 0
    parts = [prompts[start : start + _PROMPTS_PER_PART] for start in range(0, len(prompts), _PROMPTS_PER_PART)]
    for part in parts:
        key = _part_key(config, inputs, context, sampler, part)
        kept = context.store.find(key)
        if kept is not None:
            num_found += 1
            drawn = context.store.read_json(kept, "drawn.json")
        else:
            if context.should_stop():
                stop_as_asked(f"after {len(new)} of {len(prompts)} prompts")
            drawn = sampler.draw(part, seed=derive_seed(config.seed, "rollouts", config.round, part[0].id))
            _keep(context, key, drawn)
        new += _scored(config, sampler, part, drawn, author)
        all_drawn += drawn
        context.progress(len(new) / len(prompts), f"sampled for {len(new)}/{len(prompts)} prompts")
    if num_found:
        context.log(f"{num_found} of {len(parts)} parts were there already")
    if config.rewards is not None:
        new = rewarded(config, list(zip(new, all_drawn, strict=True)), records, sampler, inputs, context)
    return _write(config, inputs, context, new, with_earlier(new, earlier))


def prompts_of_round(records: list[Record], config: RolloutsConfig) -> list[Record]:
    """Return the prompts of a round, each once and without responses, in the order of the seed.

    Rounds go through all prompts one after the other and then begin anew.
    """
    different = {record.messages: record for record in reversed(records)}
    bare = [
        Record.create(each.messages, origin=each.origin, group=each.group, split=each.split, tags=each.tags)
        for each in different.values()
    ]
    order = sorted(bare, key=lambda prompt: derive_seed(config.seed, "prompts", prompt.id))
    if config.prompts is None or config.prompts >= len(order):
        return order
    start = (config.round - 1) * config.prompts
    return [order[place % len(order)] for place in range(start, start + config.prompts)]


def _earlier(inputs: Inputs, context: StageContext) -> Iterator[SampledPrompt]:
    """Read the responses of earlier rounds, which must be scored by the same reward model.

    Raises:
        IntegrityError: They were scored by another one, whose scores mean something else.
    """
    before = inputs.get("earlier")
    if before is None:
        return
    scored_by = context.store.manifest(before).inputs["reward_model"]
    if scored_by != inputs["reward_model"]:
        raise IntegrityError(
            f"earlier rollouts were scored by {scored_by}, these are by {inputs['reward_model']}",
            next_step="use one reward model for all rounds whose responses are kept, or keep: round",
        )
    for line in context.store.read_lines(before, SAMPLES):
        yield SampledPrompt.model_validate_json(line)


def _part_key(
    config: RolloutsConfig, inputs: Inputs, context: StageContext, sampler: Sampler, part: Sequence[Record]
) -> str:
    """Return the key of a part's responses: what they and their raw scores depend on."""
    shown = config.model_dump(
        mode="json", include={"samples_per_prompt", "max_new_tokens", "top_p", "batch_size", "temperature", "round",
                              "max_prompt_tokens", "seed", "generator"},
    )  # fmt: skip
    return sha256_json(
        {
            "stage": _PART, "version": VERSION, "config": shown, "dtype": str(sampler.dtype),
            "policy": weights_of(context, inputs["model"]), "template_sha256": sampler.chat.template_sha256,
            "reward_model": weights_of(context, inputs["reward_model"]),
            "reward_template_sha256": sampler.reward_chat.template_sha256, "prompts": [prompt.id for prompt in part],
        }
    )  # fmt: skip


def _keep(context: StageContext, key: str, drawn: list[list[Drawn]]) -> None:
    directory = context.workdir.parent / f"part-{key[:12]}"
    directory.mkdir(parents=True)
    (directory / "drawn.json").write_bytes(canonical_json(drawn))
    context.store.commit(
        directory, kind=_PART, stage=_PART, stage_version=VERSION, config={"key": key}, inputs={},
        metrics={"prompts": float(len(drawn))}, measurements={}, stage_key=key,
    )  # fmt: skip


def _scored(
    config: RolloutsConfig, sampler: Sampler, part: Sequence[Record], drawn: list[list[Drawn]], author: Author
) -> Iterator[SampledPrompt]:
    """Give responses their texts and their scores."""
    for prompt, responses in zip(part, drawn, strict=True):
        scored = []
        for response in responses:
            content = sampler.chat.decode(response["ids"])
            score = shaped(config, sampler.normalized(response["raw_score"]), is_finished=response["is_finished"])
            scored.append(
                ScoredResponse(
                    content=content, author=author, score=score, num_tokens=len(response["ids"]),
                    is_finished=response["is_finished"],
                    is_usable=bool(content) and not any(each in content for each in sampler.chat.control_strings),
                )
            )  # fmt: skip
        yield SampledPrompt(prompt=prompt, responses=tuple(scored))


def _write(
    config: RolloutsConfig, inputs: Inputs, context: StageContext, new: list[SampledPrompt], kept: list[SampledPrompt]
) -> StageOutput:
    """Write the splits, all samples, and the figures of this round."""
    num_comparisons, num_demonstrations = write_rows(
        context, inputs["dataset"], kept, compared=config.compared, select=config.select, top_frac=config.top_frac
    )
    figures = round_figures(new)
    for point in figures["best_of_n"]:
        context.events.metrics(point["n"], {"rollouts/best_of_n_score": point["score"]})
    write_json(context.workdir / "figures.json", figures)
    metrics = {name: value for name, value in figures.items() if isinstance(value, float)}
    metrics["best_of_k_score"] = figures["best_of_n"][-1]["score"]
    metrics["comparisons"] = float(num_comparisons)
    metrics["demonstrations"] = float(num_demonstrations)
    summary = {"prompts": len(new), "prompts_of_all_rounds": len(kept), "demonstrations": num_demonstrations}
    write_json(context.workdir / "summary.json", summary | {"comparisons": num_comparisons})
    return StageOutput("dataset", context.workdir, dict(metrics))


def write_rows(
    context: StageContext,
    dataset: ArtifactRef,
    kept: Sequence[SampledPrompt],
    *,
    compared: Compared,
    select: Selection,
    top_frac: float,
) -> tuple[int, int]:
    """Write the splits and all samples of a data set of scored responses.

    Args:
        context: The stage's context.
        dataset: Where the splits come from that hold no samples.
        kept: Prompts with their responses.
        compared: See `comparison`.
        select: See `demonstrations`.
        top_frac: See `demonstrations`.

    Returns:
        How many comparisons and how many demonstrations there are.

    Raises:
        DataError: There is no usable response at all.
    """
    comparisons = [comparison(each, compared=compared) for each in kept]
    best = demonstrations(kept, select=select, top_frac=top_frac)
    for name, rows in (("policy.jsonl", comparisons), ("sft.jsonl", best)):
        (context.workdir / name).write_bytes(b"".join(row_line(row) for row in rows))
    samples = b"".join(canonical_json(each.model_dump(mode="json")) + b"\n" for each in kept)
    (context.workdir / SAMPLES).write_bytes(samples)
    _copy_splits(context, dataset)
    return sum(row.kind == "comparison" for row in comparisons), len(best)


def _copy_splits(context: StageContext, dataset: ArtifactRef) -> None:
    source = context.workdir.parent / "input-dataset"
    names = [f"{split.value}.jsonl" for split in _COPIED]
    context.store.fetch(dataset, source, paths=names)
    for name in names:
        shutil.copyfile(source / name, context.workdir / name)


def round_figures(rows: Sequence[SampledPrompt]) -> dict[str, Any]:
    """Return a round's figures: the mean score, best-of-n for every n <= K, lengths, how many ended.

    Best-of-n is the mean over prompts of the unbiased estimate, with the KL that choosing costs.
    """
    responses = [each for row in rows for each in row.responses]
    scores = [[each.score for each in row.responses] for row in rows]
    fewest = min(len(row) for row in scores)
    curve = [
        {"n": n, "score": _mean([expected_best(row, n=n) for row in scores]), "kl_nats": kl_nats(n)}
        for n in range(1, fewest + 1)
    ]
    return {
        "prompts": float(len(rows)),
        "score": _mean([each.score for each in responses]),
        "response_tokens": _mean([float(each.num_tokens) for each in responses]),
        "finished_frac": _mean([float(each.is_finished) for each in responses]),
        "usable_frac": _mean([float(each.is_usable) for each in responses]),
        "distinct_frac": _mean([len({each.content for each in row.responses}) / len(row.responses) for row in rows]),
        "best_of_n": curve,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
