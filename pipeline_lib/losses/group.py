"""Losses of RLOO and GRPO, as sums that the caller need not divide: weights carry the step's counts.

Legend: N tokens, R responses. Whatever stands in `weight_N` sums to the normalisation of the whole
optimizer step, so losses of its forwards add up to the step's, however it is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline_lib.losses.policy import clipped_policy_loss

LossNorm = Literal["sequence", "token", "constant"]


@dataclass(frozen=True)
class GroupLoss:
    """A forward's share of the step's loss, normalised, and diagnostics as sums."""

    loss_sum: Tensor
    kl_loss: float
    """What the KL term adds to the loss; RLOO has its KL in the reward."""
    num_clipped: float
    """Tokens (GRPO) or responses (RLOO) whose clipped term is the larger one."""


def token_weights(lengths_R: Tensor, *, norm: LossNorm, num_responses: int, num_tokens: int, constant: int) -> Tensor:
    """Return the weight of every token of some responses in the loss of their optimizer step, `(N,)`.

    sequence: 1 / (R |o|), the mean over responses of their token means. token: 1 / tokens of the
    step. constant: 1 / (R constant).

    Args:
        lengths_R: Tokens of each response of the forward.
        norm: Which of the three.
        num_responses: R, responses of the whole step.
        num_tokens: Tokens of the whole step.
        constant: Tokens that a response can have at most.

    Raises:
        ValueError: A response has no token, or there is no such normalisation.

    Source: sequence: Shao et al. 2024 (arXiv 2402.03300), eq. 3; token: Yu et al. 2025 (arXiv 2503.14476),
    eq. 12; constant: Liu et al. 2025 (arXiv 2503.20783), section 3 and listing 1.
    """
    if not bool((lengths_R > 0).all()):
        raise ValueError("a response has no token, so it cannot weigh anything")
    if norm == "sequence":
        weight_R = 1.0 / (lengths_R.double() * num_responses)
    elif norm == "token":
        weight_R = torch.full_like(lengths_R, 1.0 / num_tokens, dtype=torch.float64)
    elif norm == "constant":
        weight_R = torch.full_like(lengths_R, 1.0 / (num_responses * constant), dtype=torch.float64)
    else:
        raise ValueError(f"there is no normalisation {norm!r} of the loss")
    return weight_R.repeat_interleave(lengths_R)


def grpo_loss(
    token_logp_N: Tensor,
    old_token_logp_N: Tensor,
    kl_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    beta: float,
    clip_range: float,
) -> GroupLoss:
    """Return sum_n w_n (max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)) + beta kl).

    Args:
        token_logp_N: Log-probability under the policy being trained; carries the gradient.
        old_token_logp_N: Under the policy that sampled.
        kl_N: KL estimate of each token from the policy being trained to the reference; carries the gradient.
        advantage_N: Advantage of each token's response.
        weight_N: Of `token_weights`, positive.
        beta: Weight of the KL.
        clip_range: eps.

    Raises:
        ValueError: The shapes differ.

    Source: Shao et al. 2024 (arXiv 2402.03300), eq. 3.
    """
    counts_N = torch.ones_like(old_token_logp_N, dtype=torch.bool)
    # A positive weight does not change on which side a token is clipped.
    weighted_N = advantage_N * weight_N.to(advantage_N.dtype)
    policy = clipped_policy_loss(token_logp_N, old_token_logp_N, weighted_N, counts_N, clip_range=clip_range)
    if kl_N.shape != weight_N.shape:
        raise ValueError(f"kl {tuple(kl_N.shape)} and weights {tuple(weight_N.shape)} must have one shape")
    kl = (kl_N * weight_N.to(kl_N.dtype)).sum() * beta
    return GroupLoss(policy.loss_sum + kl, float(kl.detach()), policy.num_clipped)


def rloo_loss(
    logp_R: Tensor, old_logp_R: Tensor, advantage_R: Tensor, *, num_responses: int, clip_range: float
) -> GroupLoss:
    """Return 1/R sum_r max(-A ratio, -A clip(ratio)), ratio = exp(logp - old logp) of whole responses.

    A response is one action. Where it was just sampled the ratio is 1 and the gradient is that of
    REINFORCE, -A d logp.

    Args:
        logp_R: Log-probability of each response under the policy being trained; carries the gradient.
        old_logp_R: Under the policy that sampled.
        advantage_R: Leave-one-out advantages.
        num_responses: R, responses of the whole step.
        clip_range: eps.

    Raises:
        ValueError: The shapes differ.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), eq. 9; the ratio of several passes as in TRL's RLOOTrainer.
    """
    counts_R = torch.ones_like(old_logp_R, dtype=torch.bool)
    policy = clipped_policy_loss(logp_R, old_logp_R, advantage_R, counts_R, clip_range=clip_range)
    return GroupLoss(policy.loss_sum / num_responses, 0.0, policy.num_clipped)
