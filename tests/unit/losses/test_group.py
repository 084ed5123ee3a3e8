"""RLOO's and GRPO's losses: they add up however a step is split, and refuse what does not fit."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.losses.group import LossNorm, grpo_loss, rloo_loss, token_weights

LENGTHS_R = torch.tensor([3, 1, 5, 2])


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_weights_of_a_steps_parts_are_those_of_the_whole(norm: LossNorm) -> None:
    def weights(lengths_R: torch.Tensor) -> torch.Tensor:
        return token_weights(lengths_R, norm=norm, num_responses=4, num_tokens=11, constant=8)

    whole_N = weights(LENGTHS_R)
    parts_N = torch.cat([weights(part_R) for part_R in LENGTHS_R.split(1)])
    assert torch.equal(whole_N, parts_N)
    assert float(whole_N.sum()) == pytest.approx(11 / 32 if norm == "constant" else 1.0, abs=1e-12)


def test_the_gradient_where_nothing_has_moved_is_that_of_reinforce() -> None:
    logp_R = torch.tensor([-3.0, -7.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantage_R = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
    rloo_loss(logp_R, logp_R.detach(), advantage_R, num_responses=3, clip_range=0.2).loss_sum.backward()
    assert torch.equal(logp_R.grad, -advantage_R / 3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a response has no token"):
        token_weights(torch.tensor([2, 0]), norm="token", num_responses=2, num_tokens=2, constant=4)
    with pytest.raises(ValueError, match="no normalisation 'mean'"):
        token_weights(LENGTHS_R, norm="mean", num_responses=4, num_tokens=11, constant=8)  # type: ignore[arg-type]
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        rloo_loss(two, three, three, num_responses=3, clip_range=0.2)
    with pytest.raises(ValueError, match=r"kl \(3,\) and weights \(2,\) must have one shape"):
        grpo_loss(two, two, three, two, two, beta=0.1, clip_range=0.2)
