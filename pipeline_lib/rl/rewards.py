"""Rewards per token: the KL penalty everywhere, the score at the last response token.

Legend: B rollouts, T response positions, right-padded.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

MissingEos = Literal["keep", "replace", "penalty"]


def apply_missing_eos(score_B: Tensor, is_finished_B: Tensor, *, mode: MissingEos, value: float) -> Tensor:
    """Change the score of responses that did not end by themselves.

    Args:
        score_B: Scores of the responses.
        is_finished_B: True where a response has its end-of-turn token.
        mode: `replace` sets the score to the value (OpenAI, -1), `penalty` adds the value (TRL, with
            a negative one), `keep` changes nothing.
        value: See `mode`.

    Raises:
        ValueError: The shapes differ, or there is no such mode.
    """
    if score_B.shape != is_finished_B.shape:
        raise ValueError(f"score {tuple(score_B.shape)} and is_finished {tuple(is_finished_B.shape)} must be (B,)")
    if mode not in get_args(MissingEos):
        raise ValueError(f"there is no mode {mode!r} for a missing end of turn")
    if mode == "keep":
        return score_B
    changed_B = torch.full_like(score_B, value) if mode == "replace" else score_B + value
    return torch.where(is_finished_B, score_B, changed_B)


def token_rewards(kl_BT: Tensor, score_B: Tensor, response_mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """Return r_t = -kl_coef * k_t, plus the score at each row's last response token.

    Args:
        kl_BT: KL estimate of each token.
        score_B: Score of each response.
        response_mask_BT: True where a response token counts; every row has at least one.
        kl_coef: Weight of the penalty.

    Returns:
        `(B, T)`, 0 outside the mask.

    Raises:
        ValueError: The shapes do not fit, or a row has no token.
    """
    if kl_BT.shape != response_mask_BT.shape or score_B.shape != kl_BT.shape[:1]:
        raise ValueError(
            f"kl {tuple(kl_BT.shape)}, mask {tuple(response_mask_BT.shape)} and score {tuple(score_B.shape)} "
            "must be (B, T), (B, T) and (B,)"
        )
    if not bool(response_mask_BT.any(-1).all()):
        raise ValueError("a response has no token, so its score has no place")
    reward_BT = torch.where(response_mask_BT, -kl_coef * kl_BT, torch.zeros_like(kl_BT))
    places_T = torch.arange(response_mask_BT.shape[1], device=response_mask_BT.device)
    last_B1 = (places_T * response_mask_BT).amax(-1, keepdim=True)
    return reward_BT.scatter_add(1, last_B1, score_B[:, None].to(reward_BT.dtype))


def normalize(score_B: Tensor, *, gain: float, bias: float) -> Tensor:
    """Return gain * score + bias."""
    return gain * score_B + bias
