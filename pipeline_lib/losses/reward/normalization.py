"""Scores brought to a target mean and deviation on the reference's samples. Legend: N samples."""

from __future__ import annotations

from torch import Tensor


def normalization(score_N: Tensor, *, target_mean: float = 0.0, target_std: float = 1.0) -> tuple[float, float]:
    """Return the gain and bias that give scores a mean and a deviation.

    gain = target_std / std, bias = target_mean - gain * mean, with the biased
    std = sqrt(E[x^2] - E[x]^2), taken in float64 around the mean, which is the same number.

    Args:
        score_N: Raw scores of samples of the reference policy.
        target_mean: Mean aimed at.
        target_std: Deviation aimed at, above 0.

    Returns:
        `(gain, bias)`: normalised = gain * score + bias.

    Raises:
        ValueError: There are fewer than two samples, their scores are all equal or not finite, or the
            target's deviation is not above 0.

    Source: Ziegler et al. 2019, section 2.1 and their code, `rewards.py`.
    """
    wide_N = score_N.detach().double()
    if wide_N.ndim != 1 or len(wide_N) < 2 or not target_std > 0:
        raise ValueError(f"scores {tuple(score_N.shape)} must be (N,) with N of 2 or more, target_std {target_std} > 0")
    mean, std = float(wide_N.mean()), float(wide_N.std(correction=0))
    if not 0 < std < float("inf"):
        raise ValueError(f"scores of deviation {std} cannot be normalised")
    gain = target_std / std
    return gain, target_mean - gain * mean


def mean_to_zero(score_N: Tensor) -> tuple[float, float]:
    """Return the gain 1 and the bias that gives scores the mean 0, taken in float64.

    Args:
        score_N: Raw scores of demonstrations.

    Returns:
        `(gain, bias)`: normalised = gain * score + bias.

    Raises:
        ValueError: There is no score, or one is not finite.

    Source: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5: demonstrations have a mean score of 0 before RL.
    """
    wide_N = score_N.detach().double()
    if wide_N.ndim != 1 or not len(wide_N) or not bool(wide_N.isfinite().all()):
        raise ValueError(f"scores {tuple(score_N.shape)} must be (N,), at least one, and all finite")
    return 1.0, -float(wide_N.mean())
