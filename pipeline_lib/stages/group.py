"""Stages `rloo` and `grpo`: fine-tune the SFT model on groups of its own samples, without a value function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pipeline_lib.schema import Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.reward_models import MAIN, ScoredSettings, open_heldout, open_reward_model
from pipeline_lib.stages.rewards import open_scorer
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings
from pipeline_lib.training.reward_set import MAIN_REWARD_MODEL

if TYPE_CHECKING:
    from pipeline_lib.models.scoring import Layout
    from pipeline_lib.text.chat_template import ChatTokenizer
    from pipeline_lib.training.reference import Reference
    from pipeline_lib.training.sampling_rollouts import GroupScorer

VERSION = 5


class RlooConfig(RlooSettings, ScoredSettings):
    """REINFORCE with a leave-one-out baseline (RLOO) on the prompts of the policy split."""

    method: Literal["rloo"] = "rloo"
    """The method of this candidate."""


class GrpoConfig(GrpoSettings, ScoredSettings):
    """Group relative policy optimisation (GRPO) on the prompts of the policy split."""

    method: Literal["grpo"] = "grpo"
    """The method of this candidate."""


def run(config: RlooConfig | GrpoConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `reward_model`, `dataset`; output kind `model`.

    Further inputs: `heldout_reward_model` where one is named, `reward_model:<name>` for each that `rewards` ask.

    Raises:
        DataError: A prompt is empty or longer than the model's context.
    """
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.sampling import SamplingSettings  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.group import GroupRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.sampling_rollouts import GroupSampler, prompt_trees  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_new_tokens)
    records = stage.require_prompt_texts(list(stage.read_records(context, inputs["dataset"], Split.POLICY)))
    prompts = stage.require_rows(prompt_trees(encoder, records), "prompts", Split.POLICY)
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    layout = stage.layout_for(encoder, config, is_packed=policy.is_packed)
    reference = Reference.of(policy)
    sampler = GroupSampler(
        policy, reference, _scorer(config, records, inputs, context, reference, layout, encoder.chat), layout,
        encoder.chat, SamplingSettings(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        config.samples_per_prompt, should_stop=context.should_stop, on_text=context.log,
        min_prompts=config.minibatches, generator_spec=config.generator,
        heldout=open_heldout(config, policy, inputs, context),
    )  # fmt: skip
    on_speed = stage.speeds_to(context, metric_prefix=config.method)
    recipe = GroupRecipe(sampler, prompts, settings=config, layout=layout, on_speed=on_speed)
    series = stage.train(recipe, config, context, metric_prefix=config.method)
    facts = {"dtype": str(dtype), "template_sha256": encoder.chat.template_sha256, "rows": len(prompts)}
    stage.write_online(recipe, context, facts, kl_weight="beta")
    names = ("score", "ref_kl_nats", "response_tokens", "finished_frac")
    return StageOutput("model", context.workdir, {f"last_{name}": stage.tail_mean(series, name) for name in names})


def _scorer(
    config: RlooConfig | GrpoConfig,
    records: Sequence[Record],
    inputs: Inputs,
    context: StageContext,
    reference: Reference,
    layout: Layout,
    chat: ChatTokenizer,
) -> GroupScorer:
    """Return what scores groups: the reward model, or a set of sources."""
    from pipeline_lib.training.reward_scoring import GroupSetScorer  # noqa: PLC0415  (torch)
    from pipeline_lib.training.sampling_rollouts import RewardModelScorer  # noqa: PLC0415  (torch)

    is_asked = config.rewards is None or MAIN_REWARD_MODEL in config.rewards.reward_models
    main = open_reward_model(MAIN, config, reference.policy, inputs, context) if is_asked else None
    if config.rewards is None:
        assert main is not None, "it is asked"
        return RewardModelScorer(main, layout, context.should_stop)
    each = open_scorer(
        config.rewards, records, inputs, context, settings=config, main=main, reference=reference, layout=layout,
        chat=chat,
    )  # fmt: skip
    assert each is not None, "there are rewards"
    return GroupSetScorer(each)
