"""One process of TRL's side of the PPO comparison: `python -m benchmarks.ppo_peer_trl PLAN`, in its own environment.

Imports nothing of Prefline but the rule. TRL's PPOTrainer is used as it is. Three things are put
around it: prompts come as token ids in our order; its reward model is a module whose score is the
rule over the decoded text; and its log is listened to.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import PPOConfig, PPOTrainer

from benchmarks.ppo_peer_rule import score

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAME_NATS = 1e-3
_NOTHING = -1.0
"""Stands for a masked place among token ids."""


class Collator:
    """TRL's own padding, and where the responses will begin."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)
        self.prompt_tokens = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.pad(rows)
        self.prompt_tokens = batch["input_ids"].shape[1]
        return batch


class Ids(nn.Module):
    """A backbone whose last hidden state is the token ids themselves."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Return ids as a hidden state of width 1."""
        ids = input_ids.float().masked_fill(~attention_mask.bool(), _NOTHING)
        return SimpleNamespace(hidden_states=(ids.unsqueeze(-1),))


class RuleModel(nn.Module):
    """A reward model, as TRL asks for one, whose score is the rule over the decoded response."""

    base_model_prefix = "ids"

    def __init__(self, tokenizer: Any, collator: Collator, wanted: tuple[str, ...]) -> None:
        super().__init__()
        self.ids = Ids()
        self.tokenizer, self.collator, self.wanted = tokenizer, collator, wanted

    def score(self, hidden_BT1: Tensor) -> Tensor:
        """Return every response's score at each of its places."""
        rows = hidden_BT1[:, self.collator.prompt_tokens :, 0].long().tolist()
        found = torch.tensor([score(self._text(row), self.wanted) for row in rows])
        return found[:, None, None].expand(*hidden_BT1.shape)

    def _text(self, ids: list[int]) -> str:
        kept = [id_ for id_ in ids if id_ >= 0]
        eos_id = self.tokenizer.eos_token_id
        end = kept.index(eos_id) if eos_id in kept else len(kept)
        return str(self.tokenizer.decode(kept[:end]))


class Heard(PPOTrainer):  # type: ignore[misc]
    """TRL's trainer, listened to."""

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        """Note an iteration's end and what it showed."""
        heard: dict[str, list[float]] = self.__dict__.setdefault("heard", {"ends_s": [], "scores": [], "kl": []})
        heard["ends_s"].append(time.perf_counter())
        heard["scores"].append(logs["objective/scores"])
        heard["kl"].append(logs["objective/kl"])
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Train once and write down what it took."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(plan["threads"])
    prepared = json.loads((Path(plan["folder"]) / "prepared.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        trainer, note = build(plan["preset"], prepared, scratch)
        trained = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
        trainer.train()
    heard = trainer.heard
    measured = {
        "side": "peer", "iteration_ends_s": heard["ends_s"], "scores": heard["scores"], "kl_nats": heard["kl"],
        "peak_bytes": trainer.peak_bytes, "trainable_parameters": trained, "note": note,
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "peft")},
    }  # fmt: skip
    Path(plan["output"]).write_text(json.dumps(measured))


def build(preset: dict[str, Any], prepared: dict[str, Any], scratch: str) -> tuple[Any, str]:
    """Return the trainer, and its settings in words."""
    # Read from its file alone: what stands beside it is written by a newer transformers.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(prepared["model"]) / "tokenizer.json"), eos_token=prepared["eos_token"],
        pad_token=prepared["pad_token"], padding_side="left",
    )  # fmt: skip
    collator = Collator(tokenizer)
    prompts = Dataset.from_list([{"input_ids": ids} for batch in prepared["prompts"] for ids in batch])
    args = PPOConfig(
        output_dir=scratch, per_device_train_batch_size=preset["batch_size"], gradient_accumulation_steps=1,
        num_mini_batches=preset["minibatches"], num_ppo_epochs=preset["ppo_epochs"],
        total_episodes=preset["iterations"] * preset["batch_size"], response_length=preset["new_tokens"],
        stop_token="eos" if preset["stops_at_eos"] else None, temperature=preset["temperature"],
        kl_coef=preset["kl_coef"], kl_estimator="k1", gamma=preset["gamma"], lam=preset["gae_lambda"],
        cliprange=preset["clip_range"], cliprange_value=preset["value_clip_range"], vf_coef=preset["value_coef"],
        whiten_rewards=False, missing_eos_penalty=None, num_sample_generations=0,
        local_rollout_forward_batch_size=preset["batch_size"], learning_rate=preset["learning_rate"],
        lr_scheduler_type="constant", adam_beta1=preset["betas"][0], adam_beta2=preset["betas"][1],
        adam_epsilon=preset["epsilon"], weight_decay=0.0, optim="adamw_torch_fused", gradient_checkpointing=False,
        bf16=False, fp16=False, use_cpu=True, seed=preset["seed"], save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    is_lora = preset["trainable"] == "lora"
    policy = _loaded(AutoModelForCausalLM, prepared)
    _require_same_model(policy, prepared)
    trainer = Heard(
        args=args, processing_class=tokenizer, model=policy, ref_model=None,
        reward_model=RuleModel(tokenizer, collator, tuple(preset["wanted"])),
        value_model=_value_model(preset, prepared), train_dataset=prompts, eval_dataset=prompts,
        data_collator=collator, peft_config=_lora(preset) if is_lora else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    in_order = DataLoader(prompts, batch_size=preset["batch_size"], collate_fn=collator, drop_last=True)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer, (
        f"PPOTrainer, {preset['batch_size']} rows a rollout forward, {preset['batch_size'] // preset['minibatches']} "
        "a training forward, gradient_checkpointing=False, fp32, adamw_torch_fused, SDPA attention; reference: "
        + ("the policy without its adapter" if is_lora else "a copy")
    )


def _loaded(kind: Any, prepared: dict[str, Any], **more: Any) -> Any:
    """Load a model of the prepared folder."""
    config = AutoConfig.from_pretrained(prepared["model"], local_files_only=True, **more)
    config.rope_theta = prepared["rope_theta"]
    return kind.from_pretrained(prepared["model"], config=config, dtype=torch.float32, local_files_only=True)


@torch.no_grad()
def _require_same_model(policy: Any, prepared: dict[str, Any]) -> None:
    """Check that the model says of the first prompt what it says on the other side."""
    ids_BT = torch.tensor([prepared["prompts"][0][0]])
    nats = float(nn.functional.cross_entropy(policy(input_ids=ids_BT[:, :-1]).logits[0], ids_BT[0, 1:]))
    assert abs(nats - prepared["first_prompt_nats"]) < SAME_NATS, (nats, prepared["first_prompt_nats"])


def _value_model(preset: dict[str, Any], prepared: dict[str, Any]) -> Any:
    """Return a value model that says 0 at first; with adapters, its backbone is frozen."""
    model = _loaded(AutoModelForSequenceClassification, prepared, num_labels=1)
    nn.init.zeros_(model.score.weight)
    if preset["trainable"] == "lora":
        head = model.score.weight
        inject_adapter_in_model(_lora(preset), model)  # in place, and it freezes all that is not an adapter
        head.requires_grad_(True)
    return model


def _lora(preset: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=preset["lora_rank"], lora_alpha=preset["lora_alpha"], lora_dropout=0.0, bias="none",
        target_modules=LINEAR_LAYERS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
