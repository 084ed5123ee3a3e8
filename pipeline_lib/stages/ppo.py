"""Stage `ppo`: fine-tune the SFT model against the reward model by PPO."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pipeline_lib.schema import Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.names import Name
from pipeline_lib.stages.pretraining import load_pretraining
from pipeline_lib.stages.reward_models import ScoredSettings, open_critic, open_heldout
from pipeline_lib.stages.rewards import open_scorer
from pipeline_lib.text.cropping import cropped
from pipeline_lib.training.settings import PpoSettings

if TYPE_CHECKING:
    from pipeline_lib.text.encode import Encoder

VERSION = 6


class PpoConfig(PpoSettings, ScoredSettings):
    """PPO on the prompts of the policy split."""

    method: Literal["ppo"] = "ppo"
    """The method of this candidate."""
    start_from: Name = "sft"
    """The model that is trained, and the reference: `sft`, `base`, or another candidate by name."""


def run(config: PpoConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `reward_model`, `dataset`; output `model`.

    Further inputs: `heldout_reward_model` where one is named, `reward_model:<name>` for each that `rewards` ask.

    Raises:
        DataError: A prompt is empty or longer than the model's context.
    """
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.ppo import PpoRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.sampling_rollouts import prompt_trees  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_new_tokens)
    rows = list(stage.read_records(context, inputs["dataset"], Split.POLICY))
    records = policy_prompts(config, rows, context, encoder=encoder)
    prompts = stage.require_rows(prompt_trees(encoder, records), "prompts", Split.POLICY)
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    critic = open_critic(config, policy, inputs, context)
    layout = stage.layout_for(encoder, config, is_packed=policy.is_packed and critic.value.is_packed)
    reference = Reference.of(policy)
    recipe = PpoRecipe(
        policy, reference, critic, prompts, settings=config, layout=layout, chat=encoder.chat,
        should_stop=context.should_stop, on_text=context.log, on_speed=stage.speeds_to(context, metric_prefix="ppo"),
        heldout=open_heldout(config, policy, inputs, context),
        scorer=open_scorer(
            config.rewards, records, inputs, context, settings=config, main=critic, reference=reference,
            layout=layout, chat=encoder.chat,
        ),
        pretraining=load_pretraining(config.pretraining, encoder.chat, context, seed=config.seed),
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="ppo")
    facts = {"dtype": str(dtype), "template_sha256": encoder.chat.template_sha256, "rows": len(prompts)}
    stage.write_online(recipe, context, facts, kl_weight="kl_coef")
    names = ("score", "ref_kl_nats", "kl_coef", "response_tokens", "finished_frac")
    return StageOutput("model", context.workdir, {f"last_{name}": stage.tail_mean(series, name) for name in names})


def policy_prompts(
    config: PpoConfig, records: list[Record], context: StageContext, *, encoder: Encoder
) -> list[Record]:
    """Return the records with their last user turn cut to whole sentences, where that is configured.

    Of too long a prompt the sentences that fit are kept, so that it still ends with a whole one.

    Args:
        config: The marks, and how long a prompt may be.
        records: The rows, in their order.
        context: Told how many are left out.
        encoder: Counts tokens.

    Raises:
        DataError: A prompt is empty; the rows are named.
    """
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)

    stage.require_prompt_texts(records)
    if config.prompt_start_text is None and config.prompt_end_text is None:
        return records
    whole = replace(encoder, max_prompt_tokens=sys.maxsize)

    def with_text(record: Record, text: str) -> Record:
        messages = (*record.messages[:-1], record.messages[-1].model_copy(update={"content": text}))
        return record.model_copy(update={"messages": messages})

    def fits(record: Record, text: str) -> bool:
        ids, _ = whole.prompt(with_text(record, text).messages, where=f"row {record.id[:12]}")
        return len(ids) <= config.max_prompt_tokens

    kept = []
    for record in records:
        text = cropped(
            record.messages[-1].content, start_text=config.prompt_start_text, end_text=config.prompt_end_text,
            fits=partial(fits, record),
        )  # fmt: skip
        if text is not None:
            kept.append(with_text(record, text))
    context.log(f"{len(records) - len(kept)} of {len(records)} prompts have no whole sentence and are left out")
    return kept
