"""One process of TRL's side: `python -m benchmarks.peer_trl PLAN`, in an environment of its own.

Imports nothing of Prefline but the fingerprints. TRL's trainers are used as they are; what is set is
said in `note`. Three things are put around them: rows come as token ids, so that both sides train on
the same; the first adapter and head weights are copied in; losses and batches are listened to.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, pack_dataset

from benchmarks import same
from benchmarks.digests import sequence_digest, step_digest

IGNORED = -100


class PretokenizedDpo(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


class PretokenizedSft(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer on rows that are token ids, packed by TRL update by update."""

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each update was done, and the memory held by then."""

    def __init__(self) -> None:
        self.step_ends_s: list[float] = []
        self.peak_bytes = 0

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time."""
        self.step_ends_s.append(time.perf_counter())
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Train once and write down what it took."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    options, folder = plan["options"], Path(plan["folder"])
    torch.set_num_threads(options["threads"])
    facts = json.loads((folder / "facts.json").read_text())
    file = json.loads((folder / "steps.json").read_text())
    build = {"dpo": _dpo, "dpo_in_step": _dpo, "reward": _reward, "sft": _sft}[plan["job"]]
    with tempfile.TemporaryDirectory() as scratch:
        clock = Clock()
        trainer, note = build(plan, facts, file, scratch)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainables = _copy_first_weights(trainer.model, folder / "first.safetensors")
        heard = _listen(trainer, labelled=plan["job"] != "reward")
        trainer.train()
        packs = trainer.args.gradient_accumulation_steps
        measured = {
            "side": "peer",
            "losses": _by_step(heard["losses"], packs, mean=plan["job"] != "sft"),
            "step_ends_s": clock.step_ends_s,
            "peak_bytes": clock.peak_bytes,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "digests": [
                step_digest(digest for forward in heard["digests"][at : at + packs] for digest in forward)
                for at in range(0, len(heard["digests"]), packs)
            ],
            "tokens": sum(heard["tokens"]),
            "counted_tokens": sum(heard["counted"]),
            "trainable_parameters": trainables,
            "note": note,
            "versions": {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "peft")},
        }
    Path(plan["output"]).write_text(json.dumps(measured))


def _dpo(plan: dict[str, Any], facts: dict[str, Any], file: dict[str, Any], scratch: str) -> tuple[Any, str]:
    options, precompute = plan["options"], plan["job"] == "dpo"
    rows = [
        {"prompt_ids": row["prompt"], "chosen_ids": row["responses"][0], "rejected_ids": row["responses"][1]}
        for step in file["steps"]
        for row in _by_length(step)
    ]
    per_forward, settings = _settings(plan, facts, scratch, rows_per_step=len(file["steps"][0]))
    args = DPOConfig(
        **settings, beta=same.DPO_BETA, loss_type=["sigmoid"], max_length=None, precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=per_forward,
    )  # fmt: skip
    trainer = PretokenizedDpo(
        model=_language_model(facts, options), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(facts), peft_config=_lora(options, "CAUSAL_LM"),
    )  # fmt: skip
    where = "precomputed" if precompute else "in the step"
    return trainer, f"DPOTrainer, reference {where}, {_words(args)}"


def _reward(plan: dict[str, Any], facts: dict[str, Any], file: dict[str, Any], scratch: str) -> tuple[Any, str]:
    options = plan["options"]
    rows = [
        {"chosen_ids": row["prompt"] + row["responses"][0], "rejected_ids": row["prompt"] + row["responses"][1]}
        for step in file["steps"]
        for row in _by_length(step)
    ]
    _, settings = _settings(plan, facts, scratch, rows_per_step=len(file["steps"][0]))
    args = RewardConfig(**settings, max_length=None, center_rewards_coefficient=same.CENTRING)
    model = AutoModelForSequenceClassification.from_pretrained(
        facts["model"], num_labels=1, dtype=_dtype(facts, options), local_files_only=True
    )
    # A score is read at the last token that is not padding: padding must not be the token that ends a turn.
    model.config.pad_token_id = _tokenizer(facts).pad_token_id
    trainer = RewardTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(facts),
        peft_config=_lora(options, "SEQ_CLS"),
    )  # fmt: skip
    return trainer, f"RewardTrainer, {_words(args)}"


def _sft(plan: dict[str, Any], facts: dict[str, Any], file: dict[str, Any], scratch: str) -> tuple[Any, str]:
    options, bins = plan["options"], file["pack_bins"]
    packed = []
    for step in file["steps"]:
        rows = [
            {
                "input_ids": row["prompt"] + row["responses"][0],
                "labels": [IGNORED] * len(row["prompt"]) + row["responses"][0],
            }
            for row in step
        ]
        packed.append(pack_dataset(Dataset.from_list(rows), options["pack_tokens"], "bfd"))
        assert len(packed[-1]) == bins, f"TRL packs an update into {len(packed[-1])} sequences, not {bins}"
    _, settings = _settings(plan, facts, scratch, rows_per_step=bins, rows_per_forward=1)
    args = SFTConfig(**settings, packing=True, packing_strategy="bfd", max_length=options["pack_tokens"])
    trainer = PretokenizedSft(
        model=_language_model(facts, options), args=args, train_dataset=concatenate_datasets(packed),
        processing_class=_tokenizer(facts), peft_config=_lora(options, "CAUSAL_LM"),
    )  # fmt: skip
    return trainer, f"SFTTrainer, packing=True (bfd, {options['pack_tokens']} tokens), {_words(args)}"


def _settings(
    plan: dict[str, Any],
    facts: dict[str, Any],
    scratch: str,
    *,
    rows_per_step: int,
    rows_per_forward: int | None = None,
) -> tuple[int, dict[str, Any]]:
    """Return rows of a forward, and the training arguments that all jobs share."""
    options = plan["options"]
    per_forward = min(rows_per_step, rows_per_forward or options["peer_rows"] or rows_per_step)
    assert rows_per_step % per_forward == 0, "an update must be a whole number of forwards"
    is_bf16 = facts["dtype"] == "bfloat16"
    return per_forward, {
        "output_dir": scratch, "per_device_train_batch_size": per_forward,
        "gradient_accumulation_steps": rows_per_step // per_forward,
        "max_steps": options["steps"],
        "learning_rate": same.LEARNING_RATE, "adam_beta1": same.BETAS[0], "adam_beta2": same.BETAS[1],
        "adam_epsilon": same.EPSILON, "weight_decay": 0.0, "max_grad_norm": same.MAX_GRAD_NORM,
        "lr_scheduler_type": "constant", "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": options["gradient_checkpointing"], "bf16": is_bf16, "fp16": False,
        "use_cpu": options["device"] == "cpu", "train_sampling_strategy": "sequential", "seed": same.SEED,
        "dataloader_num_workers": 0, "dataloader_pin_memory": options["device"] != "cpu",
        "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def _words(args: Any) -> str:
    """Return what matters of the settings, in words."""
    return (
        f"{args.per_device_train_batch_size} rows a forward x {args.gradient_accumulation_steps}, rows of an update "
        f"ordered by length, gradient_checkpointing={args.gradient_checkpointing}, bf16={args.bf16}, "
        f"optim={args.optim.value}, SDPA attention, dropout off, no logging, no workers"
    )


def _by_length(step: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order an update's rows by length, so that forwards of a part of them hold little padding."""
    return sorted(step, key=lambda row: len(row["prompt"]) + max(len(ids) for ids in row["responses"]))


def _dtype(facts: dict[str, Any], options: dict[str, Any]) -> torch.dtype:
    """Frozen weights in the format of the run; trained ones in fp32, as on our side."""
    return torch.float32 if options["trainable"] == "full" else getattr(torch, facts["dtype"])


def _language_model(facts: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(facts["model"], dtype=_dtype(facts, options), local_files_only=True)


def _tokenizer(facts: dict[str, Any]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(facts["model"], local_files_only=True)
    tokenizer.pad_token = next(token for token in ("<|endoftext|>", "<|pad|>") if token in tokenizer.get_vocab())
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    return tokenizer


def _lora(options: dict[str, Any], task: str) -> LoraConfig | None:
    if options["trainable"] == "full":
        return None
    return LoraConfig(
        r=same.LORA_RANK, lora_alpha=same.LORA_ALPHA, lora_dropout=0.0, bias="none", task_type=task,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )  # fmt: skip


def _copy_first_weights(model: torch.nn.Module, path: Path) -> int:
    """Give every trained weight the value that the other side starts with; return how many numbers there are."""
    first = load_file(path)
    trained = {_plain(name): value for name, value in model.named_parameters() if value.requires_grad}
    wanted = {_plain(name): value for name, value in first.items()}
    assert set(trained) == set(wanted), f"other weights are trained: {sorted(set(trained) ^ set(wanted))[:4]}"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(wanted[name])
    return sum(parameter.numel() for parameter in trained.values())


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def _listen(trainer: Any, *, labelled: bool) -> dict[str, list[Any]]:
    """Note every forward's loss, and the fingerprints of what is in it."""
    heard: dict[str, list[Any]] = {"losses": [], "digests": [], "tokens": [], "counted": []}
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        sequences = _sequences(inputs, labelled=labelled)
        heard["digests"].append([sequence_digest(ids, counted) for ids, counted in sequences])
        heard["tokens"].append(sum(len(ids) for ids, _ in sequences))
        heard["counted"].append(sum(len(counted) for _, counted in sequences))
        result = compute(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        heard["losses"].append(float(loss.detach()))
        return result

    trainer.compute_loss = compute_loss
    return heard


def _sequences(inputs: dict[str, Any], *, labelled: bool) -> list[tuple[list[int], list[int]]]:
    """Return each sequence of a forward without padding, and its labels that count."""
    ids_BT = inputs["input_ids"].cpu()
    if "position_ids" in inputs:
        labels, positions = inputs["labels"][0].tolist(), inputs["position_ids"][0].tolist()
        flat = ids_BT[0].tolist()
        sequences: list[tuple[list[int], list[int]]] = []
        starts = [at for at, position in enumerate(positions) if position == 0] + [len(flat)]
        for start, end in pairwise(starts):
            counted = [label for label in labels[start:end] if label != IGNORED]
            sequences.append((flat[start:end], counted))
        return sequences
    mask_BT = inputs["attention_mask"].cpu().bool()
    counts_BT = inputs["completion_mask"].cpu().bool() if labelled else torch.zeros_like(mask_BT)
    return [
        (ids[mask].tolist(), ids[counts].tolist()) for ids, mask, counts in zip(ids_BT, mask_BT, counts_BT, strict=True)
    ]


def _by_step(losses: list[float], packs: int, *, mean: bool) -> list[float]:
    """Add up the losses of an update's forwards (SFT divides by the update's tokens), or average them."""
    sums = [sum(losses[at : at + packs]) for at in range(0, len(losses), packs)]
    return [value / packs for value in sums] if mean else sums


if __name__ == "__main__":
    main()
