"""Stage `ppo`: fine-tune the SFT model against the reward model by PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline_lib.schema import Record, Split
from pipeline_lib.stages.contract import Inputs, StageContext, StageOutput
from pipeline_lib.stages.names import Name
from pipeline_lib.training.settings import PpoSettings

if TYPE_CHECKING:
    from pipeline_lib.text.encode import Encoder, Tree

VERSION = 1


class PpoConfig(PpoSettings):
    """PPO on the prompts of the policy split."""

    method: Literal["ppo"] = "ppo"
    """The method of this candidate."""
    start_from: Name = "sft"
    """The model that is trained, and the reference: `sft`, `base`, or another candidate by name."""


def run(config: PpoConfig, inputs: Inputs, context: StageContext) -> StageOutput:
    """Train; inputs `sft_model`, `reward_model`, `dataset`; output kind `model`."""
    from pipeline_lib.models.base import load_causal_model  # noqa: PLC0415  (torch)
    from pipeline_lib.stages import training_stage as stage  # noqa: PLC0415  (torch)
    from pipeline_lib.training.critic import Critic, Normalization  # noqa: PLC0415  (torch)
    from pipeline_lib.training.recipes.ppo import PpoRecipe  # noqa: PLC0415  (torch)
    from pipeline_lib.training.reference import Reference  # noqa: PLC0415  (torch)
    from pipeline_lib.training.trained_model import dtype_for, prepare  # noqa: PLC0415  (torch)

    directory = stage.fetch_model(context, inputs["sft_model"], "sft_model")
    reward_directory = stage.fetch_model(context, inputs["reward_model"], "reward_model")
    encoder = stage.encoder_for(directory, config, max_response_tokens=config.max_new_tokens)
    prompts = _prompts(encoder, list(stage.read_records(context, inputs["dataset"], Split.POLICY)))
    dtype = dtype_for(config)
    policy = prepare(load_causal_model(directory, dtype=dtype), directory, config, seed=config.seed)
    normalization = Normalization(**stage.read_json(reward_directory.parent / "normalization.json"))
    critic = Critic(reward_directory, config, normalization, seed=config.seed + 1)

    recipe = PpoRecipe(
        policy, Reference.of(policy), critic, stage.require_rows(prompts, "prompts", Split.POLICY),
        settings=config, layout=stage.layout_for(encoder, config, is_packed=policy.is_packed),
        chat=encoder.chat, should_stop=context.should_stop, on_text=context.log,
    )  # fmt: skip
    series = stage.train(recipe, config, context, metric_prefix="ppo")
    _write_samples(context.workdir / "samples.jsonl", recipe.samples)
    policy.save(context.workdir / "model")
    facts = {"dtype": str(dtype), "template_sha256": encoder.chat.template_sha256, "rows": len(prompts)}
    stage.write_facts(context.workdir, facts)
    names = ("score", "ref_kl_nats", "kl_coef", "response_tokens", "finished_frac")
    return StageOutput("model", context.workdir, {f"last_{name}": stage.tail_mean(series, name) for name in names})


def _prompts(encoder: Encoder, records: list[Record]) -> list[Tree]:
    """Encode every different prompt once, without its responses."""
    different = {record.messages: record for record in reversed(records)}
    first_seen = [record for record in records if different.get(record.messages) is record]
    return [encoder.tree(record.model_copy(update={"responses": (), "ranks": ()})) for record in first_seen]


def _write_samples(path: Path, samples: list[str]) -> None:
    rows = [json.dumps(json.loads(row), ensure_ascii=False, sort_keys=True) for row in samples]
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
