"""The whole distribution of a reference beside the policy's: KL(policy || reference) at every counted token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.losses.tokens import HeadStates, full_kl_from_hidden, token_logps_from_hidden
from pipeline_lib.models.logprobs import HEAD_CHUNK_TOKENS, logit_cap, predicting_states
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.reference import Reference


def head_states(model: PreTrainedModel, batch: TreeBatch) -> HeadStates:
    """Run a language model; return what its distributions at the counted tokens follow from."""
    head = model.get_output_embeddings()
    return HeadStates(predicting_states(model, batch), head.weight, getattr(head, "bias", None), logit_cap(model))


@torch.no_grad()
def reference_states(reference: Reference, batch: TreeBatch) -> HeadStates:
    """Run the reference; to be called before the policy, whose adapters are off inside."""
    with reference.active() as model:
        return head_states(model, batch)


def token_logps_and_kl(policy: PreTrainedModel, reference: Reference, batch: TreeBatch) -> tuple[Tensor, Tensor]:
    """Return log-probability and KL(policy || reference) of each counted token, both `(N,)`, nats.

    Args:
        policy: Carries the gradient; run once.
        reference: The model that training began with.
        batch: The trees.
    """
    ref = reference_states(reference, batch)
    states = head_states(policy, batch)
    token_logp_N, _ = token_logps_from_hidden(
        states.hidden_ND, states.weight_VD, batch.label_N, head_bias_V=states.bias_V, softcap=states.softcap,
        chunk_tokens=HEAD_CHUNK_TOKENS,
    )  # fmt: skip
    return token_logp_N, full_kl_from_hidden(states, ref, chunk_tokens=HEAD_CHUNK_TOKENS)
