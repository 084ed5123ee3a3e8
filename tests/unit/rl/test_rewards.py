"""Rewards per token: where the score goes, what an answer without an end gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline_lib.rl.rewards import apply_missing_eos, token_rewards

MASK = torch.tensor([[True, True, True], [True, False, False]])
KL = torch.tensor([[0.1, -0.2, 0.3], [0.5, float("nan"), 9.0]], dtype=torch.float64)
SCORE = torch.tensor([2.0, -1.0], dtype=torch.float64)


def test_a_rows_rewards_add_up_to_its_score_less_its_kl() -> None:
    found = token_rewards(KL, SCORE, MASK, kl_coef=0.3)
    assert found.sum(-1).tolist() == pytest.approx([2.0 - 0.3 * 0.2, -1.0 - 0.3 * 0.5], rel=1e-12)
    assert (found[~MASK] == 0).all()


def test_without_kl_only_the_last_token_is_rewarded() -> None:
    assert token_rewards(torch.zeros(2, 3), SCORE.float(), MASK, kl_coef=0.3).tolist() == [[0, 0, 2], [-1, 0, 0]]


def test_the_last_token_is_found_wherever_padding_stands() -> None:
    found = token_rewards(torch.zeros(2, 3), SCORE.float(), MASK.flip(1), kl_coef=0.3)
    assert found.tolist() == [[0, 0, 2], [0, 0, -1]]


def test_scores_of_finished_answers_stay() -> None:
    finished = torch.tensor([True, True])
    for mode in ("keep", "replace", "penalty"):
        chosen: Any = mode
        assert torch.equal(apply_missing_eos(SCORE, finished, mode=chosen, value=-5.0), SCORE)


def test_refusals() -> None:
    empty = MASK & torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="a response has no token"):
        token_rewards(KL, SCORE, empty, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"must be \(B, T\), \(B, T\) and \(B,\)"):
        token_rewards(KL, SCORE[:, None], MASK, kl_coef=0.1)
    unknown: Any = "drop"
    with pytest.raises(ValueError, match="no mode 'drop'"):
        apply_missing_eos(SCORE, torch.tensor([True, False]), mode=unknown, value=0.0)
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        apply_missing_eos(SCORE, torch.tensor([True]), mode="keep", value=0.0)
