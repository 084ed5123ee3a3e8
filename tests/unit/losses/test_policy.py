"""PPO's clipped losses: gradients, what does not count, extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline_lib.losses.policy import clipped_policy_loss, clipped_value_loss

NAN = float("nan")
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def normal(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_policy_gradient_is_the_derivative(seed: int) -> None:
    old, advantages = normal(seed), normal(seed + 10)

    def loss(token_logp: Tensor) -> Tensor:
        return clipped_policy_loss(token_logp, old, advantages, MASK, clip_range=0.2).loss_sum

    assert torch.autograd.gradcheck(loss, (old + normal(seed + 20, 0.5)).requires_grad_())


@pytest.mark.parametrize("seed", range(3))
def test_value_gradient_is_the_derivative(seed: int) -> None:
    old, returns = normal(seed), normal(seed + 10)

    def loss(values: Tensor) -> Tensor:
        return clipped_value_loss(values, old, returns, MASK, value_clip_range=0.2).loss_sum

    assert torch.autograd.gradcheck(loss, (old + normal(seed + 20, 0.5)).requires_grad_())


def test_what_does_not_count_changes_nothing_not_even_as_nan() -> None:
    counted = [torch.where(MASK, normal(seed), 0.0) for seed in range(3)]
    spoilt = [torch.where(MASK, values, NAN) for values in counted]
    figures, gradients = [], []
    for first, second, third in (counted, spoilt):
        logp, values = first.clone().requires_grad_(), first.clone().requires_grad_()
        policy = clipped_policy_loss(logp, second, third, MASK, clip_range=0.2)
        value = clipped_value_loss(values, second, third, MASK, value_clip_range=0.2)
        (policy.loss_sum + value.loss_sum).backward()
        assert logp.grad is not None
        assert values.grad is not None
        figures.append(
            (float(policy.loss_sum.detach()), policy.num_clipped, policy.approx_kl_sum, policy.policy_kl_sum,
             float(value.loss_sum.detach()), value.num_clipped)
        )  # fmt: skip
        gradients.append((logp.grad.tolist(), values.grad.tolist()))
        assert (logp.grad[~MASK] == 0).all()
        assert (values.grad[~MASK] == 0).all()
    assert figures[0] == figures[1]
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clipped_ratio_that_overflows_has_gradient_0(dtype: torch.dtype) -> None:
    token_logp = torch.tensor([0.0, -2000.0, -1.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-2000.0, 0.0, -1.0], dtype=dtype)
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=dtype)
    result = clipped_policy_loss(token_logp, old, advantages, torch.ones(3, dtype=torch.bool), clip_range=0.2)
    result.loss_sum.backward()
    assert float(result.loss_sum.detach()) == pytest.approx(-1.2 + 0.8 - 2.0)
    assert token_logp.grad is not None
    assert token_logp.grad.tolist() == [0.0, 0.0, -2.0]
    assert result.num_clipped == 2


def test_first_step_is_the_plain_policy_gradient() -> None:
    """Where the policy is the one that sampled, nothing is clipped and the gradient is -A."""
    token_logp, advantages = normal(0).requires_grad_(), normal(1)
    result = clipped_policy_loss(
        token_logp, token_logp.detach().clone(), advantages, torch.ones(2, 4, dtype=torch.bool), clip_range=0.2
    )
    result.loss_sum.backward()
    assert token_logp.grad is not None
    torch.testing.assert_close(token_logp.grad, -advantages, rtol=1e-12, atol=1e-12)
    assert (result.num_clipped, result.approx_kl_sum, result.policy_kl_sum) == (0, 0, 0)


def test_sums_add_up_over_parts() -> None:
    """A step's loss is the sum over its micro-batches, however it is cut."""
    new, old, advantages = (normal(seed) for seed in range(3))
    whole = clipped_policy_loss(new, old, advantages, MASK, clip_range=0.2)
    rows = [clipped_policy_loss(new[k], old[k], advantages[k], MASK[k], clip_range=0.2) for k in (0, 1)]
    assert float(whole.loss_sum) == pytest.approx(sum(float(row.loss_sum) for row in rows), rel=1e-12)
    assert whole.num_clipped == sum(row.num_clipped for row in rows)


def test_shapes_must_agree() -> None:
    new, old, advantages = (normal(seed) for seed in range(3))
    with pytest.raises(ValueError, match="must have one shape"):
        clipped_policy_loss(new, old, advantages, MASK[:, 0], clip_range=0.2)
    with pytest.raises(ValueError, match="must have one shape"):
        clipped_value_loss(new, old, advantages[:, :1], MASK, value_clip_range=0.2)
