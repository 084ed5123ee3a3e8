"""Advantages from a group of samples of one prompt, without a value function.

Legend: G prompts, K samples of each. One advantage a sample, which all its tokens share.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["std", "none"]
GROUP_EPSILON = 1e-4
"""Added to a group's standard deviation, so that a group of equal rewards has advantages of 0."""


def leave_one_out(reward_GK: Tensor) -> Tensor:
    """Return each sample's reward minus the mean of the others' (RLOO).

    A_i = r_i - 1/(K-1) sum_{j != i} r_j = K/(K-1) (r_i - mean). The baseline does not depend on the
    sample that it is subtracted from, so the gradient has no bias.

    Args:
        reward_GK: Reward of each sample, KL included.

    Raises:
        ValueError: The shape is not (G, K) with K >= 2.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 2.2; Kool et al. 2019.
    """
    _require_groups(reward_GK)
    samples = reward_GK.shape[1]
    others_GK = (reward_GK.sum(1, keepdim=True) - reward_GK) / (samples - 1)
    return reward_GK - others_GK


def group_normalized(reward_GK: Tensor, *, scale: Scale, epsilon: float = GROUP_EPSILON) -> Tensor:
    """Return each sample's reward minus its group's mean, over the group's standard deviation (GRPO).

    A_i = (r_i - mean(r)) / (std(r) + epsilon). The deviation divides by K - 1, as TRL, verl and
    OpenRLHF have it; the paper does not say.

    Args:
        reward_GK: Reward of each sample, without KL: that is a term of the loss.
        scale: `none` leaves the deviation out (Dr. GRPO): dividing by it weighs prompts on which all
            samples are nearly alike the most.
        epsilon: Added to the deviation.

    Raises:
        ValueError: The shape is not (G, K) with K >= 2, or there is no such scale.

    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; Liu et al. 2025 (arXiv 2503.20783), section 3.
    """
    _require_groups(reward_GK)
    apart_GK = reward_GK - reward_GK.mean(1, keepdim=True)
    if scale == "none":
        return apart_GK
    if scale == "std":
        deviation_G1 = reward_GK.std(1, keepdim=True)
        return apart_GK / (deviation_G1 + epsilon)
    raise ValueError(f"there is no scale {scale!r} of advantages in a group")


def alike_frac(reward_GK: Tensor) -> float:
    """Return the share of groups whose rewards are all the same: no advantage, so nothing to learn from.

    Raises:
        ValueError: The shape is not (G, K) with K >= 2.
    """
    _require_groups(reward_GK)
    return float((reward_GK == reward_GK[:, :1]).all(1).float().mean())


def _require_groups(reward_GK: Tensor) -> None:
    if reward_GK.ndim != 2 or reward_GK.shape[1] < 2:
        raise ValueError(f"rewards {tuple(reward_GK.shape)} must be (prompts, samples of each), 2 samples at least")
    if not bool(torch.isfinite(reward_GK).all()):
        raise ValueError("a reward is not finite, so its group has no mean")
