"""GAE against the sum as it is printed; whitening against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline_lib.rl.advantage import gae, whiten


def rollouts(seed: int, lengths: tuple[int, ...] = (7, 4, 1, 0)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    rewards, values = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.arange(shape[1]) < torch.tensor(lengths)[:, None]


def naive(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 after the end."""
    after = [*values, 0.0][1:]
    deltas = [r + gamma * nxt - v for r, v, nxt in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.99, 1.0)])
def test_against_the_naive_double_loop(gamma: float, lam: float) -> None:
    rewards, values, mask = rollouts(0)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    for row, length in enumerate(mask.sum(-1).tolist()):
        expected = naive(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(returns[mask], (advantages + values)[mask], rtol=0, atol=0)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_lambda_1_returns_are_discounted_sums_of_rewards() -> None:
    rewards, values, mask = rollouts(1, (5,))
    _, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    expected = [sum(0.9 ** (s - t) * float(rewards[0, s]) for s in range(t, 5)) for t in range(5)]
    assert returns[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_padding_changes_nothing() -> None:
    rewards, values, mask = rollouts(2)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
    spoilt = [
        torch.cat([torch.where(mask, part, float("nan")), torch.full((4, 3), 1e9)], 1) for part in (rewards, values)
    ]
    wider = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    again = gae(spoilt[0], spoilt[1], wider, gamma=0.9, gae_lambda=0.8)
    assert torch.equal(again[0][:, :7], advantages)
    assert torch.equal(again[1][:, :7], returns)


def test_neither_carries_a_gradient() -> None:
    rewards, values, mask = rollouts(3)
    advantages, returns = gae(rewards, values.requires_grad_(), mask, gamma=1.0, gae_lambda=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_gae_refusals() -> None:
    rewards, values, mask = rollouts(4)
    with pytest.raises(ValueError, match="must have one shape"):
        gae(rewards, values[:, :-1], mask, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="must be right-padded"):
        gae(rewards, values, mask.flip(1), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match=r"must be \(rollouts, response positions\)"):
        gae(rewards[0], values[0], mask[0], gamma=1.0, gae_lambda=1.0)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_against_numpy(unbiased: bool, shift_mean: bool) -> None:
    values, _, mask = rollouts(5)
    values = 3 * values + 5
    found = whiten(values, mask, shift_mean=shift_mean, unbiased=unbiased)
    counted = values[mask].numpy()
    scaled = (counted - counted.mean()) / np.sqrt(counted.var(ddof=int(unbiased)) + 1e-8)
    np.testing.assert_allclose(found[mask].numpy(), scaled + (0 if shift_mean else counted.mean()), rtol=1e-12)
    assert float(found[mask].mean()) == pytest.approx(0 if shift_mean else counted.mean(), abs=1e-12)
    assert (found[~mask] == 0).all()


def test_whitening_ignores_what_does_not_count() -> None:
    values, _, mask = rollouts(6)
    spoilt = torch.where(mask, values, float("nan"))
    assert torch.equal(whiten(spoilt, mask, shift_mean=False), whiten(values, mask, shift_mean=False))


@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_values_that_are_equal(unbiased: bool) -> None:
    for num in (1, 4):
        equal, mask = torch.full((num,), 3.0), torch.ones(num, dtype=torch.bool)
        assert whiten(equal, mask, shift_mean=True, unbiased=unbiased).tolist() == [0.0] * num
        assert whiten(equal, mask, shift_mean=False, unbiased=unbiased).tolist() == [3.0] * num


def test_whitening_refusals() -> None:
    values, _, mask = rollouts(7)
    with pytest.raises(ValueError, match="the mask is empty"):
        whiten(values, torch.zeros_like(mask), shift_mean=True)
    with pytest.raises(ValueError, match="must have one shape"):
        whiten(values, mask[0], shift_mean=True)
