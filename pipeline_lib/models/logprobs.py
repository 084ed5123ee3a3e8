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
from pipeline_lib.text.pack import TreeBatch

HEAD_CHUNK_TOKENS = 256
"""Counted positions whose logits are in memory at once."""


def logit_scale(model: PreTrainedModel) -> float:
    """Return the factor between the head's output and the logits; 1 in all but a few families.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`.
    """
    divisor, factor = (getattr(model.config, name, None) for name in ("logits_scaling", "logit_scale"))
    if isinstance(divisor, int | float) and divisor:
        return 1.0 / float(divisor)
    return float(factor) if isinstance(factor, int | float) and factor else 1.0


@torch.inference_mode()
def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse a language model that changes its logits after the head, as Gemma 2 caps them.

    Log-probabilities are taken from the head's own output, at most scaled, so they would silently be
    another model's.

    Raises:
        ConfigError: The model's logits are not those of its head.
    """
    ids = torch.arange(4, device=model.device)[None]
    backbone: nn.Module = model.base_model
    scale = logit_scale(model)
    of_head = model.get_output_embeddings()(backbone(input_ids=ids, use_cache=False).last_hidden_state).float() * scale
    of_model = model(input_ids=ids, use_cache=False).logits.float()
    # 2 % is far above what bf16 loses and far below what a cap changes.
    if float((of_head - of_model).abs().max()) > 0.02 * float(of_head.abs().max()):
        raise ConfigError(
            f"models of type {model.config.model_type!r} cap or otherwise change their logits after the head, "
            "which is not supported",
            next_step="choose a model.source such as a Llama, Qwen, Mistral, Gemma 3 or GPT-2",
        )


def predicting_states(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Run a language model's backbone; return `(N, D)`, what its head makes the logits of each counted token of.

    They are the hidden states at `source_N`, with the scale that the model gives its logits.
    """
    hidden_ND = hidden_states(model, batch)[batch.source_N]
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
        with_entropy=with_entropy,
    )
    return TokenLogps(token_logp_N, entropy_N)
