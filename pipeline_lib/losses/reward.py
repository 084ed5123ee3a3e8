"""Reward-model losses on scores (methods 2.2). Legend: P pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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


def _same_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) != 1:
        raise ValueError(f"scores and margins must have one shape, not {sorted(shapes)}")
