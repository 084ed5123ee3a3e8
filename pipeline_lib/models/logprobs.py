"""Token log-probabilities and scalar scores of a batch of trees, in one forward.

Legend: P flat positions, N counted tokens, R responses, D width, V vocabulary.
The language-model head runs on the counted positions alone, in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.tokens import token_logps_from_hidden
from pipeline_lib.models.backbone import hidden_states
from pipeline_lib.models.few_rows import linear
from pipeline_lib.text.pack import TreeBatch

HEAD_CHUNK_TOKENS = 256
"""Counted positions whose logits are in memory at once."""


def logit_scale(model: PreTrainedModel) -> float:
    """Return the factor between the head's output and the logits; 1 in all but a few families.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`.
    """
    config = model.config.get_text_config()
    divisor, factor = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale"))
    if isinstance(divisor, int | float) and divisor:
        return 1.0 / float(divisor)
    return float(factor) if isinstance(factor, int | float) and factor else 1.0


def logit_cap(model: PreTrainedModel) -> float | None:
    """Return the bound c of a model that makes c tanh(logits / c) of its logits, as Gemma 2 does; None in most."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return next((float(cap) for cap in found if isinstance(cap, int | float) and cap > 0), None)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the logits `(..., V)` that a model makes of hidden states `(..., D)`: scaled, and capped, as it does."""
    head = model.get_output_embeddings()
    logits = linear(hidden, head.weight, head.bias) if type(head) is nn.Linear else head(hidden)
    logits = logits * logit_scale(model)
    cap = logit_cap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.inference_mode()
def require_known_logits(model: PreTrainedModel) -> None:
    """Refuse a language model that changes its logits after the head in a way that is not known here.

    Log-probabilities are taken from the head's own output, scaled and capped where the configuration
    says so; with any other change they would silently be another model's.

    Raises:
        ConfigError: The model's logits are not those of its head.
    """
    ids = torch.arange(4, device=model.device)[None]
    backbone: nn.Module = model.base_model
    of_head = logits_of(model, backbone(input_ids=ids, use_cache=False).last_hidden_state).float()
    of_model = model(input_ids=ids, use_cache=False).logits.float()
    # 2 % is far above what bf16 loses and far below what a cap changes.
    if float((of_head - of_model).abs().max()) > 0.02 * float(of_head.abs().max()):
        raise ConfigError(
            f"models of type {model.config.model_type!r} change their logits after the head in a way that is "
            "not supported: neither by a factor nor by a cap of their configuration",
            next_step="choose a model.source such as a Llama, Qwen, Mistral, Gemma or GPT-2",
        )


def predicting_states(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Run a language model's backbone; return `(N, D)`, what its head makes the logits of each counted token of.

    They are the hidden states at `source_N`, with the scale that the model gives its logits.
    """
    hidden_ND = hidden_states(model, batch, read=batch.source_N)[batch.source_N]
    scale = logit_scale(model)
    return hidden_ND if scale == 1.0 else hidden_ND * scale


@dataclass(frozen=True)
class TokenLogps:
    """What a language model says of the counted tokens of a batch."""

    token_logp_N: Tensor
    """Log-probability of each counted token, nats, float32 (float64 stays)."""
    entropy_N: Tensor | None
    """Entropy of the predicted distribution, nats; carries no gradient."""


def token_logps(
    model: PreTrainedModel, batch: TreeBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> TokenLogps:
    """Score the counted tokens of a batch under a causal language model.

    Args:
        model: A causal language model, with or without an adapter in it.
        batch: The trees.
        temperature: Logits are divided by it before the softmax, as when sampling.
        with_entropy: Also return the entropy of each prediction.
    """
    head = model.get_output_embeddings()
    token_logp_N, entropy_N = token_logps_from_hidden(
        predicting_states(model, batch),
        head.weight,
        batch.label_N,
        head_bias_V=getattr(head, "bias", None),
        chunk_tokens=HEAD_CHUNK_TOKENS,
        temperature=temperature,
        softcap=logit_cap(model),
        with_entropy=with_entropy,
    )
    return TokenLogps(token_logp_N, entropy_N)
