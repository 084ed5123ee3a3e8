"""Stages `rloo` and `grpo`: fine-tune the SFT model on groups of its own samples, without a value function."""

from __future__ import annotations

import json
from typing import Literal

from pipeline_lib.schema import Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings

VERSION = 1


class RlooConfig(RlooSettings):
    """REINFORCE with a leave-one-out baseline (RLOO) on the prompts of the policy split."""

    method: Literal["rloo"] = "rloo"
    """The method of this candidate."""


class GrpoConfig(GrpoSettings):
    """Group relative policy optimisation (GRPO) on the prompts of the policy split."""

    method: Literal["grpo"] = "grpo"
    """The method of this candidate."""


def run(config: RlooConfig | GrpoConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `reward_model`, `dataset`; output kind `model`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.models.sampling import SamplingSettings  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training import sampling_rollouts as rollouts  # noqa: PLC0415  (torch)
    from pipeline_lib.training.critic import Normalization  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.group import GroupRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    reward_directory = stage.fetch_model(context, inputs["reward_model"], "reward_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_new_tokens)
    prompts = rollouts.prompt_trees(encoder, list(stage.read_records(context, inputs["dataset"], Split.POLICY)))
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    layout = stage.layout_for(encoder, config, is_packed=policy.is_packed)
    normalization = Normalization(**stage.read_json(reward_directory.parent / "normalization.json"))
    sampler = rollouts.GroupSampler(
        policy, Reference.of(policy),
        rollouts.RewardModelScorer(reward_directory, config, normalization, layout), layout, encoder.chat,
        SamplingSettings(max_new_tokens=config.max_new_tokens, temperature=config.temperature),
        config.samples_per_prompt, should_stop=context.should_stop, on_text=context.log,
    )  # fmt: skip
    recipe = GroupRecipe(sampler, stage.require_rows(prompts, "prompts", Split.POLICY), settings=config, layout=layout)
    series = stage.train(recipe, config, context, metric_prefix=config.method)
    lines = [json.dumps(json.loads(row), ensure_ascii=False, sort_keys=True) + "\n" for row in recipe.samples]
    (context.workdir / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    policy.save(context.workdir / "model")
    facts = {"dtype": str(dtype), "template_sha256": encoder.chat.template_sha256, "rows": len(prompts)}
    stage.write_facts(context.workdir, facts)
    names = ("score", "ref_kl_nats", "response_tokens", "finished_frac")
    return StageOutput("model", context.workdir, {f"last_{name}": stage.tail_mean(series, name) for name in names})
