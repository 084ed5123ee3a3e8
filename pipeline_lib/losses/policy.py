"""PPO's clipped losses, as sums over tokens; the caller divides by the step's tokens.

Any shape is taken, with a bool mask of the same shape, True = counts. What stands outside the mask
changes neither a sum nor a gradient, NaN included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy loss and its diagnostics, all sums over the counted tokens."""

    loss_sum: Tensor
    num_clipped: float
    """Tokens whose clipped term is the larger one."""
    approx_kl_sum: float
    """0.5 (logp - old logp)^2, summed."""
    policy_kl_sum: float
    """old logp - logp, summed."""


@dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss, sums over the counted tokens."""

    loss_sum: Tensor
    num_clipped: float


def clipped_policy_loss(
    token_logp: Tensor, old_token_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> PolicyLoss:
    """Return the sum of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)), ratio = exp(logp - old logp).

    Args:
        token_logp: Log-probability under the policy being trained; carries the gradient.
        old_token_logp: Under the policy that sampled.
        advantages: Advantage of each token.
        mask: True where a token counts.
        clip_range: eps.

    Raises:
        ValueError: The shapes differ.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
    """
    _same_shape(token_logp, old_token_logp, advantages, mask)
    zeros = torch.zeros_like(token_logp)
    log_ratio = torch.where(mask, token_logp - old_token_logp, zeros)
    advantages = torch.where(mask, advantages, zeros)
    detached = log_ratio.detach()
    too_high = (advantages > 0) & (detached.exp() > 1 + clip_range)
    too_low = (advantages < 0) & (detached.exp() < 1 - clip_range)
    # Clipped tokens leave before exp: an overflow there would turn their gradient of 0 into NaN.
    ratio = torch.where(too_high | too_low, zeros, log_ratio).exp()
    ratio = torch.where(too_high, zeros + (1 + clip_range), torch.where(too_low, zeros + (1 - clip_range), ratio))
    return PolicyLoss(
        loss_sum=-(advantages * ratio).sum(),
        num_clipped=float((too_high | too_low).sum()),
        approx_kl_sum=float(0.5 * detached.square().sum()),
        policy_kl_sum=float(-detached.sum()),
    )


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_range: float
) -> ValueLoss:
    """Return the sum of 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2).

    Args:
        values: New values; carry the gradient.
        old_values: Values at sampling time.
        returns: Advantages plus old values, before whitening.
        mask: True where a token counts.
        value_clip_range: c.

    Raises:
        ValueError: The shapes differ.

    Source: Ziegler et al. 2019, `train_policy.py`.
    """
    _same_shape(values, old_values, returns, mask)
    zeros = torch.zeros_like(values)
    values, old_values, returns = (torch.where(mask, each, zeros) for each in (values, old_values, returns))
    kept = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    plain, clipped = (values - returns).square(), (kept - returns).square()
    return ValueLoss(
        loss_sum=0.5 * torch.maximum(plain, clipped).sum(),
        num_clipped=float((clipped > plain).sum()),
    )


def _same_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        raise ValueError(f"all arguments must have one shape, not {sorted(shapes)}")
