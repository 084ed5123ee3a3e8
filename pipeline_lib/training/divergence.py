"""The whole distribution of a reference beside the policy's: KL(policy || reference) at every counted token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.losses.tokens import full_kl_from_hidden, token_logps_from_hidden
from pipeline_lib.models.logprobs import HEAD_CHUNK_TOKENS, logit_cap, predicting_states
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.reference import Reference


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference's distributions at the counted tokens follow from."""

    hidden_ND: Tensor
    head_weight_VD: Tensor
    head_bias_V: Tensor | None
    softcap: float | None = None
    """The reference's cap on its logits, where it has one."""

    @classmethod
    @torch.no_grad()
    def of(cls, reference: Reference, batch: TreeBatch) -> ReferenceStates:
        """Run the reference; to be called before the policy, whose adapters are off inside."""
        with reference.active() as model:
            head = model.get_output_embeddings()
            bias_V = getattr(head, "bias", None)
            return cls(
                predicting_states(model, batch), head.weight.detach(),
                None if bias_V is None else bias_V.detach(), logit_cap(model),
            )  # fmt: skip

    def kl(self, policy: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
        """Return KL(policy || reference) of each counted token, `(N,)`, nats, with gradient to the policy.

        Args:
            policy: Whose head is taken.
            hidden_ND: The policy's last hidden states at the positions that predict the tokens.
        """
        head = policy.get_output_embeddings()
        return full_kl_from_hidden(
            hidden_ND, head.weight, self.hidden_ND, self.head_weight_VD, head_bias_V=getattr(head, "bias", None),
            ref_head_bias_V=self.head_bias_V, chunk_tokens=HEAD_CHUNK_TOKENS,
            softcap=logit_cap(policy), ref_softcap=self.softcap,
        )  # fmt: skip


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
