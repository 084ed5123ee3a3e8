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
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.text.pack import TreeBatch

__all__ = ["HEAD_CHUNK_TOKENS", "TokenLogps", "hidden_states", "require_plain_head", "supports_trees", "token_logps"]

HEAD_CHUNK_TOKENS = 256
"""Counted positions whose logits are in memory at once."""


@torch.inference_mode()
def require_plain_head(model: PreTrainedModel) -> None:
    """Refuse a language model that changes its logits after the head, as Gemma 2 caps them.

    Log-probabilities are taken from the head's own output, so they would silently be another model's.

    Raises:
        ConfigError: The model's logits are not those of its head.
    """
    ids = torch.arange(4, device=model.device)[None]
    backbone: nn.Module = model.base_model
    of_head = model.get_output_embeddings()(backbone(input_ids=ids, use_cache=False).last_hidden_state).float()
    of_model = model(input_ids=ids, use_cache=False).logits.float()
    # 2 % is far above what bf16 loses and far below what a cap or a scale changes.
    if float((of_head - of_model).abs().max()) > 0.02 * float(of_head.abs().max()):
        raise ConfigError(
            f"models of type {model.config.model_type!r} scale or cap their logits after the head, "
            "which is not supported",
            next_step="choose a model.source such as a Llama, Qwen, Mistral or GPT-2",
        )


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
    hidden_PD = hidden_states(model, batch)
    head = model.get_output_embeddings()
    token_logp_N, entropy_N = token_logps_from_hidden(
        hidden_PD[batch.source_N],
        head.weight,
        batch.label_N,
        head_bias_V=getattr(head, "bias", None),
        chunk_tokens=HEAD_CHUNK_TOKENS,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return TokenLogps(token_logp_N, entropy_N)
