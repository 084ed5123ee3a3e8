"""Residual dropout: where it acts on each architecture, and that on GPT-2 it is the one that GPT-2 has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.adapters import add_adapter
from pipeline_lib.models.residual import dropped, residual_branches
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.text.pack import pack
from pipeline_lib.training.forward import training_forward
from tests.toy import DEMONSTRATIONS

SIZE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SIZE, "intermediate_size": 64, "num_key_value_heads": 2}
GPT2: dict[str, Any] = {
    "vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT: dict[str, Any] = {
    **SIZE, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "attention_dropout": 0.0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "gemma": GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8),
    "olmo2": Olmo2Config(**GROUPED),
    "granite": GraniteConfig(**GROUPED, residual_multiplier=0.5),
    "cohere": CohereConfig(**GROUPED),
    "phi": PhiConfig(**GROUPED),
    "gpt2": GPT2Config(**GPT2),
    "gpt_neox": GPTNeoXConfig(**SIZE, intermediate_size=64),
    "gpt_neox, one after the other": GPTNeoXConfig(**SIZE, intermediate_size=64, use_parallel_residual=False),
    "opt": OPTConfig(**OPT),
}
IDS = torch.tensor([[5, 9, 13, 21, 34, 2, 7]])


def make(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_sub_layer_is_found_and_nothing_is_left_changed(kind: str) -> None:
    model = make(CONFIGS[kind])
    before = model(IDS).logits
    branches = residual_branches(model)
    assert len({id(branch) for branch in branches}) == 4
    torch.manual_seed(0)
    with dropped(branches, 0.5):
        during = model(IDS).logits
        with torch.no_grad():  # a reference, a measurement
            assert torch.equal(model(IDS).logits, before)
    assert float((during - before).detach().abs().max()) > 1e-3
    assert torch.equal(model(IDS).logits, before)
    assert not any(module.training for module in model.modules())


def test_on_gpt2_it_is_gpt2s_own() -> None:
    """The same draws at the same places: its own module in training mode gives the same bits, gradients too."""
    ours = make(GPT2Config(**GPT2))
    theirs = make(GPT2Config(**GPT2, resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.0)).train()
    torch.manual_seed(11)
    expected = theirs(IDS, labels=IDS).loss
    torch.manual_seed(11)
    with dropped(residual_branches(ours), 0.3):
        found = ours(IDS, labels=IDS).loss
    assert torch.equal(found, expected)
    own, other = gradients(ours, found), gradients(theirs, expected)
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_adapters_in_the_layers_change_nothing_of_it() -> None:
    model = make(CONFIGS["llama"])
    plain = [type(branch).__name__ for branch in residual_branches(model)]
    add_adapter(model, LoraSettings(rank=2, alpha=4), seed=0, encode=lambda _: [])
    assert [type(branch).__name__ for branch in residual_branches(model)] == plain


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_recomputed_activations_are_dropped_alike(kind: str) -> None:
    model = make(CONFIGS[kind])
    branches = residual_branches(model)
    found = []
    for is_recomputed in (False, True):
        torch.manual_seed(4)
        with (
            training_forward([model], pack(DEMONSTRATIONS[:1]), gradient_checkpointing=is_recomputed),
            dropped(branches, 0.3),
        ):
            found.append(gradients(model, model(IDS, labels=IDS, use_cache=False).loss))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputing_switches_no_dropout_of_the_model_on() -> None:
    """OPT's layers take the flag that asks for recomputation for their dropout's."""
    model = make(OPTConfig(**OPT, dropout=0.3))
    expected = gradients(model, model(IDS, labels=IDS).loss)
    with training_forward([model], pack(DEMONSTRATIONS[:1]), gradient_checkpointing=True):
        found = gradients(model, model(IDS, labels=IDS, use_cache=False).loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
    assert not any(module.training for module in model.modules())


def test_a_model_that_adds_its_residuals_inside_of_its_sub_layers_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'bloom' model join its residual stream is not known"):
        residual_branches(make(BloomConfig(vocab_size=67, hidden_size=32, n_layer=2, n_head=4)))
