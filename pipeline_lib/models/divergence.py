"""The KL divergence of a policy from its reference at every counted token, in one policy forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.losses.tokens import token_logps_from_hidden
from pipeline_lib.models.logprobs import HEAD_CHUNK_TOKENS, hidden_states
from pipeline_lib.text.pack import TreeBatch


def token_logps_and_kl(
    policy: PreTrainedModel,
    reference: Callable[[], AbstractContextManager[PreTrainedModel]],
    batch: TreeBatch,
) -> tuple[Tensor, Tensor]:
    """Return log-probability and KL(policy || reference) of each counted token, both `(N,)`, nats.

    Args:
        policy: Carries the gradient.
        reference: Gives the reference for the length of a `with` block.
        batch: The trees.
    """
    with torch.no_grad(), reference() as reference_model:
        reference_ND = hidden_states(reference_model, batch)[batch.source_N]
        reference_head = reference_model.get_output_embeddings().weight.detach()
    hidden_ND = hidden_states(policy, batch)[batch.source_N]
    head = policy.get_output_embeddings()
    token_logp_N, _ = token_logps_from_hidden(
        hidden_ND, head.weight, batch.label_N, head_bias_V=getattr(head, "bias", None), chunk_tokens=HEAD_CHUNK_TOKENS
    )
    from pipeline_lib.losses.tokens import full_kl_from_hidden

    kl_N = full_kl_from_hidden(hidden_ND, head.weight, reference_ND, reference_head, chunk_tokens=HEAD_CHUNK_TOKENS)
    return token_logp_N, kl_N
