"""Arithmetic on pairs of scores. Legend: P pairs, S steps of a segment, N examples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry(
    better_P: Tensor, worse_P: Tensor, *, margin_P: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """Return -log sigma(better - worse - margin) + centring * (better + worse)^2 for each pair.

    The centring term is TRL's `c * mean((r_w + r_l)^2)`, which keeps scores around 0.

    Args:
        better_P: Scores of the preferred responses.
        worse_P: Scores of the others.
        margin_P: LLaMA-2's margin, 0 or more; None is 0.
        centring: Weight of the centring term.

    Returns:
        One loss a pair, `(P,)`, in the scores' format.

    Raises:
        ValueError: The shapes differ.

    Source: Bradley and Terry 1952; Touvron et al. 2023, eq. 2.
    """
    _same_shape(better_P, worse_P, *([] if margin_P is None else [margin_P]))
    difference_P = better_P - worse_P
    if margin_P is not None:
        difference_P = difference_P - margin_P
    loss_P = -logsigmoid(difference_P)
    if centring:
        loss_P = loss_P + centring * (better_P + worse_P).square()
    return loss_P


def accuracy(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """Return the share of pairs whose better response scores strictly higher.

    Raises:
        ValueError: The shapes differ, or there is no pair.
    """
    _same_shape(better_P, worse_P)
    if better_P.numel() == 0:
        raise ValueError("there is no pair to take a share of")
    return (better_P > worse_P).to(torch.float64).mean()


def segment_preference(first_reward_PS: Tensor, second_reward_PS: Tensor, first_share_P: Tensor) -> Tensor:
    """Return the cross-entropy of preferences between segments, scored by the sums of their steps' rewards.

    P(first) = sigma(sum_s first - sum_s second); the loss is -mu log P(first) - (1 - mu) log P(second).

    Args:
        first_reward_PS: Predicted reward of each step of the first segments; 0 beyond a segment's end.
        second_reward_PS: Of the second segments.
        first_share_P: mu: 1 where the first is preferred, 0 where the second is, 1/2 where neither.

    Returns:
        One loss a pair, `(P,)`.

    Raises:
        ValueError: The shapes do not fit.

    Source: Christiano et al. 2017 (arXiv 1706.03741), section 2.2.3, eq. 1.
    """
    _same_shape(first_reward_PS.sum(-1), second_reward_PS.sum(-1), first_share_P)
    lead_P = first_reward_PS.sum(-1) - second_reward_PS.sum(-1)
    return -first_share_P * logsigmoid(lead_P) - (1 - first_share_P) * logsigmoid(-lead_P)


def safety_classification(logit_N: Tensor, is_safe_N: Tensor) -> Tensor:
    """Return the binary cross-entropy of each example, the auxiliary loss of a safety reward model.

    Args:
        logit_N: Above 0 for safe: the score itself, or the output of a head of its own.
        is_safe_N: True where the example is safe.

    Raises:
        ValueError: The shapes differ.

    Source: Touvron et al. 2023, A.3.4, which prints no formula.
    """
    _same_shape(logit_N, is_safe_N)
    return binary_cross_entropy_with_logits(logit_N, is_safe_N.to(logit_N.dtype), reduction="none")


def _same_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        raise ValueError(f"scores and margins must have one shape, not {sorted(shapes)}")
