"""The whole distribution of a reference beside the policy's: KL(policy || reference) at every counted token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.losses.tokens import HeadStates, full_kl_from_hidden, token_logps_from_hidden
from pipeline_lib.models.logprobs import HEAD_CHUNK_TOKENS, logit_cap, predicting_states
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.reference import Reference


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference's distributions at the counted tokens follow from."""

    states: HeadStates

    @classmethod
    @torch.no_grad()
    def of(cls, reference: Reference, batch: TreeBatch) -> ReferenceStates:
        """Run the reference; to be called before the policy, whose adapters are off inside."""
        with reference.active() as model:
            found = head_states(model, batch)
            bias_V = None if found.bias_V is None else found.bias_V.detach()
            return cls(HeadStates(found.hidden_ND, found.weight_VD.detach(), bias_V, found.softcap))

    def kl(self, policy: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
        """Return KL(policy || reference) of each counted token, `(N,)`, nats, with gradient to the policy.

        Args:
            policy: Whose head is taken.
            hidden_ND: The policy's last hidden states at the positions that predict the tokens.
        """
        head = policy.get_output_embeddings()
        return full_kl_from_hidden(
            hidden_ND, head.weight, self.states.hidden_ND, self.states.weight_VD,
            head_bias_V=getattr(head, "bias", None), ref_head_bias_V=self.states.bias_V,
            chunk_tokens=HEAD_CHUNK_TOKENS, softcap=logit_cap(policy), ref_softcap=self.states.softcap,
        )  # fmt: skip


def head_states(model: PreTrainedModel, batch: TreeBatch) -> HeadStates:
    """Run a language model; return what its distributions at the counted tokens follow from."""
    head = model.get_output_embeddings()
    return HeadStates(predicting_states(model, batch), head.weight, getattr(head, "bias", None), logit_cap(model))


def token_logps_and_kl(policy: PreTrainedModel, reference: Reference, batch: TreeBatch) -> tuple[Tensor, Tensor]:
    """Return log-probability and KL(policy || reference) of each counted token, both `(N,)`, nats.

    Args:
        policy: Carries the gradient; run once.
        reference: The model that training began with.
        batch: The trees.
    """
    states = ReferenceStates.of(reference, batch)
    hidden_ND = predicting_states(policy, batch)
    head = policy.get_output_embeddings()
    token_logp_N, _ = token_logps_from_hidden(
        hidden_ND, head.weight, batch.label_N, head_bias_V=getattr(head, "bias", None), chunk_tokens=HEAD_CHUNK_TOKENS,
        softcap=logit_cap(policy),
    )  # fmt: skip
    return token_logp_N, states.kl(policy, hidden_ND)
