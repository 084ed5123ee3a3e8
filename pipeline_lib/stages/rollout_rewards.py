"""Scores of a round's samples from a set of reward sources, in the place of the reward model's alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline_lib.errors import RewardError
from pipeline_lib.schema import Record
from pipeline_lib.stages.contract import Inputs, StageContext
from pipeline_lib.stages.rewards import open_scorer
from pipeline_lib.stages.rollout_rows import SampledPrompt

if TYPE_CHECKING:
    from pipeline_lib.stages.rollout_parts import Drawn, Sampler
    from pipeline_lib.stages.rollouts import RolloutsConfig
    from pipeline_lib.training.reward_scoring import SetScorer

Group = tuple[SampledPrompt, "list[Drawn]"]
"""A prompt with its responses as text, and as the tokens that were drawn."""


def shaped(config: RolloutsConfig, score: float, *, is_finished: bool) -> float:
    """Return a score after the rule for responses that did not end by themselves."""
    if is_finished or config.missing_eos == "keep":
        return score
    return config.missing_eos_value + (score if config.missing_eos == "penalty" else 0.0)


def rewarded(
    config: RolloutsConfig,
    groups: Sequence[Group],
    records: Sequence[Record],
    sampler: Sampler,
    inputs: Inputs,
    context: StageContext,
) -> list[SampledPrompt]:
    """Score the responses of all prompts with the configured sources.

    Args:
        config: Its `rewards` are set.
        groups: The prompts with their responses.
        records: The rows that the prompts come from, with their answers and tags.
        sampler: Holds the models.
        inputs: The stage's inputs; further reward models are `reward_model:<name>`.
        context: The stage's context.

    Returns:
        The prompts with new scores, without responses that no source could score and without prompts
        that have none left.

    Raises:
        RewardError: A source could not score a response and the set says to stop, or nothing is left.
        InterruptedRunError: The process was asked to end.
    """
    from pipeline_lib.stages.training_stage import stop_as_asked  # noqa: PLC0415  (torch)
    from pipeline_lib.text.encode import Tree  # noqa: PLC0415
    from pipeline_lib.training.recipe import StopRequestedError  # noqa: PLC0415  (torch)
    from pipeline_lib.training.rollout import rollout_tree  # noqa: PLC0415  (torch)

    scorer = _scorer(config, groups, records, sampler, inputs, context)
    prompts: list[Tree] = []
    responses: list[Tree] = []
    is_finished: list[bool] = []
    for sampled, drawn in groups:
        ids = sampler.scored_prompt_ids(sampled.prompt)
        for one in drawn:
            prompts.append(Tree(sampled.prompt.id, tuple(ids), (), (False,) * len(ids)))
            responses.append(rollout_tree(len(responses), ids, one["ids"]))
            is_finished.append(one["is_finished"])
    try:
        scored = scorer.score(prompts, responses, is_finished)
    except StopRequestedError:
        stop_as_asked("while responses were scored; the responses are kept")
    figures = {f"rollouts/reward/{name}": float(part.mean()) for name, part in scored.parts_R.items()}
    context.events.metrics(config.round, figures)
    assert scored.kept is not None, "a set tells what it has scored"
    found = dict(zip(scored.kept, scored.score_R.tolist(), strict=True))
    return _with_scores(config, groups, found)


def _with_scores(config: RolloutsConfig, groups: Sequence[Group], found: dict[int, float]) -> list[SampledPrompt]:
    """Put scores, by the place of the response among all, in the place of the reward model's."""
    kept, place = [], 0
    for sampled, _ in groups:
        responses = []
        for response in sampled.responses:
            if place in found:
                score = shaped(config, found[place], is_finished=response.is_finished)
                responses.append(response.model_copy(update={"score": score}))
            place += 1
        if responses:
            kept.append(sampled.model_copy(update={"responses": tuple(responses)}))
    if not kept:
        raise RewardError("no response has a score", next_step="correct the reward sources")
    return kept


def _scorer(
    config: RolloutsConfig,
    groups: Sequence[Group],
    records: Sequence[Record],
    sampler: Sampler,
    inputs: Inputs,
    context: StageContext,
) -> SetScorer:
    from pipeline_lib.models.scoring import Layout  # noqa: PLC0415  (torch)
    from pipeline_lib.models.trees import supports_trees  # noqa: PLC0415  (torch)
    from pipeline_lib.stages.rollout_parts import TOKENS_PER_FORWARD  # noqa: PLC0415  (torch)
    from pipeline_lib.training.critic import FrozenRewardModel  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.settings import TrainingSettings  # noqa: PLC0415
    from pipeline_lib.training.trained_model import TrainedModel  # noqa: PLC0415  (torch)

    # The number format of the models is all that they take of a training's settings.
    settings = TrainingSettings(precision=config.precision)
    main = FrozenRewardModel(sampler.reward_directory, sampler.normalization, settings=settings)
    reference = Reference(TrainedModel(sampler.policy, None, sampler.directory), sampler.policy)
    layout = Layout(supports_trees(main.model, log=context.log), sampler.chat.pad_id, TOKENS_PER_FORWARD)
    scorer = open_scorer(
        config.rewards, _rows(groups, records), inputs, context, settings=settings, main=main, reference=reference,
        layout=layout, chat=sampler.chat,
    )  # fmt: skip
    assert scorer is not None, "there are rewards"
    return scorer


def _rows(groups: Sequence[Group], records: Sequence[Record]) -> list[Record]:
    """Return the first row of each prompt under the prompt's id."""
    by_messages: dict[Any, Record] = {record.messages: record for record in reversed(records)}
    prompts = [sampled.prompt for sampled, _ in groups]
    return [by_messages[prompt.messages].model_copy(update={"id": prompt.id}) for prompt in prompts]
