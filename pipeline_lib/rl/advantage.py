"""Advantages and whitening. Legend: B rollouts, T response positions, right-padded."""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, response_mask_BT: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by generalised advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, where both V and A
    are 0 after the last response token. Positions outside the mask hold 0 in both results. Nothing
    is whitened here.

    Args:
        rewards_BT: Reward of emitting each token, in reward-model score units.
        values_BT: The value function before each token, same units.
        response_mask_BT: True where a response token counts; contiguous from position 0.
        gamma: Discount per token, in (0, 1].
        gae_lambda: 0 gives one-step temporal differences, 1 Monte-Carlo returns.

    Returns:
        `(advantages_BT, returns_BT)` with `returns = advantages + values`. Neither carries a gradient.

    Raises:
        ValueError: The shapes differ, or a row has a gap in its mask.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 11 and 16.
    """
    if not rewards_BT.shape == values_BT.shape == response_mask_BT.shape:
        raise ValueError(
            f"rewards {tuple(rewards_BT.shape)}, values {tuple(values_BT.shape)} and mask "
            f"{tuple(response_mask_BT.shape)} must have one shape (rollouts, response positions)"
        )
    if rewards_BT.ndim != 2:
        raise ValueError(f"rewards {tuple(rewards_BT.shape)} must be (rollouts, response positions)")
    if bool((response_mask_BT[:, 1:] & ~response_mask_BT[:, :-1]).any()):
        raise ValueError("a row of the response mask has a gap: responses must be right-padded")
    zeros_BT = torch.zeros_like(values_BT)
    rewards_BT = torch.where(response_mask_BT, rewards_BT, zeros_BT)
    values_BT = torch.where(response_mask_BT, values_BT, zeros_BT)
    advantages_BT = zeros_BT.clone()
    next_advantage_B = next_value_B = values_BT.new_zeros(len(values_BT))
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = delta_B + gamma * gae_lambda * next_advantage_B
        next_advantage_B = torch.where(response_mask_BT[:, t], next_advantage_B, zeros_BT[:, t])
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = next_advantage_B
    return advantages_BT, advantages_BT + values_BT


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool, unbiased: bool = False, epsilon: float = WHITEN_EPSILON
) -> Tensor:
    """Scale the counted values to unit variance, and to mean 0 where asked.

    (x - mean) * rsqrt(var + epsilon), plus the mean again where `shift_mean` is False. Positions
    outside the mask are 0 in the result (TRL 0.11 leaks non-zero rewards there).

    Args:
        values: Any shape.
        mask: True where a value counts.
        shift_mean: False keeps the mean (rewards), True removes it (advantages).
        unbiased: Divide the variance by n - 1 (TRL, verl) instead of n (N-details).
        epsilon: Added to the variance.

    Raises:
        ValueError: The shapes differ, or nothing counts.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have one shape")
    counted = values[mask]
    if counted.numel() == 0:
        raise ValueError("the mask is empty: there is nothing to whiten")
    mean = counted.mean()
    divisor = max(counted.numel() - 1, 1) if unbiased else counted.numel()
    variance = (counted - mean).square().sum() / divisor
    # What does not count is set to 0 first: NaN there would reach the gradient through the variance.
    whitened = (torch.where(mask, values, torch.zeros_like(values)) - mean) * torch.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
