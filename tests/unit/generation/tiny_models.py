"""Tiny models of several architectures with the byte tokenizer's vocabulary, uneven enough to sample from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.tiny import write_tiny_model
from tests.toy import sharpen

VOCABULARY = 259
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_MPT: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}

ARCHITECTURES = ("llama", "qwen2", "gemma", "gpt2")


def tiny(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 4) -> PreTrainedModel:
    """A random model in evaluation mode."""
    makers: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SHAPE, head_dim=8)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=12)),
        "mpt": lambda: MptForCausalLM(MptConfig(**_MPT)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = makers[kind]().to(dtype)
    sharpen(model, 6.0 if kind != "gemma" else 3.0)
    return model.eval()


def write_sharp_model(folder: Path) -> Path:
    """Write a tiny model that is uneven enough to sample from; returns its folder."""
    write_tiny_model(folder, seed=3)
    model = load_causal_model(folder, dtype=torch.float32)
    sharpen(model, 6.0)
    model.save_pretrained(folder)
    return folder
