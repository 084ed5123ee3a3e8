"""PPO's arithmetic against loops over plain numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pipeline_lib.losses.policy import clipped_policy_loss, clipped_value_loss
from pipeline_lib.rl.advantage import gae, whiten
from pipeline_lib.rl.kl import Estimator, KlController, full_kl, kl_estimate
from pipeline_lib.training.optimizer import epsilon_at, learning_rate_at
from pipeline_lib.training.settings import OptimizerSettings, PpoSettings

Rows = list[list[float]]


def drawn(seed: int, *, scale: float = 1.0, count: int = 5, width: int = 7) -> tuple[Rows, list[int]]:
    """Rows of numbers and how many of each count."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, width) for _ in range(count)]
    lengths[0] = width
    return [[draw.gauss(0, scale) for _ in range(width)] for _ in range(count)], lengths


def tensor(rows: Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask(lengths: Sequence[int], width: int = 7) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def with_nan_outside(rows: Rows, lengths: Sequence[int]) -> Tensor:
    return torch.where(mask(lengths), tensor(rows), torch.full((), math.nan, dtype=torch.float64))


# Losses ----------------------------------------------------------------------------------------------------


def clip(x: float, low: float, high: float) -> float:
    return max(low, min(high, x))


@pytest.mark.parametrize("seed", range(5))
def test_clipped_policy_loss(seed: int) -> None:
    new, lengths = drawn(seed, scale=0.4)
    old, _ = drawn(seed + 100, scale=0.4)
    advantage, _ = drawn(seed + 200)
    advantage[0][0] = 0.0
    token_logp = with_nan_outside(new, lengths).requires_grad_()
    found = clipped_policy_loss(
        token_logp, with_nan_outside(old, lengths), with_nan_outside(advantage, lengths), mask(lengths), clip_range=0.2
    )
    loss = approx = policy = 0.0
    clipped = 0
    slopes = [[0.0] * 7 for _ in range(5)]
    for b, length in enumerate(lengths):
        for t in range(length):
            d, a = new[b][t] - old[b][t], advantage[b][t]
            ratio = math.exp(d)
            plain, cut = -a * ratio, -a * clip(ratio, 0.8, 1.2)
            loss += max(plain, cut)
            clipped += cut > plain
            approx += 0.5 * d * d
            policy -= d
            slopes[b][t] = -a * ratio if plain >= cut else 0.0
    assert found.loss_sum.dtype == torch.float64
    assert found.loss_sum.item() == pytest.approx(loss, rel=1e-9)
    assert found.num_clipped == clipped
    assert found.approx_kl_sum == pytest.approx(approx, rel=1e-9)
    assert found.policy_kl_sum == pytest.approx(policy, rel=1e-9)
    found.loss_sum.backward()
    assert token_logp.grad is not None
    assert token_logp.grad.flatten().tolist() == pytest.approx([x for row in slopes for x in row], rel=1e-9, abs=1e-15)


def test_a_ratio_that_overflows_leaves_no_nan() -> None:
    token_logp = torch.tensor([900.0, -900.0], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(2, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = clipped_policy_loss(token_logp, old, advantages, torch.tensor([True, True]), clip_range=0.2)
    found.loss_sum.backward()
    assert found.loss_sum.item() == pytest.approx(-1.2 + 0.8)
    assert token_logp.grad is not None
    assert token_logp.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_clipped_value_loss(seed: int) -> None:
    new, lengths = drawn(seed)
    old, _ = drawn(seed + 100)
    returns, _ = drawn(seed + 200)
    values = with_nan_outside(new, lengths).requires_grad_()
    found = clipped_value_loss(
        values, with_nan_outside(old, lengths), with_nan_outside(returns, lengths), mask(lengths), value_clip_range=0.3
    )
    loss = 0.0
    clipped = 0
    slopes = [[0.0] * 7 for _ in range(5)]
    for b, length in enumerate(lengths):
        for t in range(length):
            v, v_old, r = new[b][t], old[b][t], returns[b][t]
            plain, cut = (v - r) ** 2, (clip(v, v_old - 0.3, v_old + 0.3) - r) ** 2
            loss += 0.5 * max(plain, cut)
            clipped += cut > plain
            slopes[b][t] = v - r if plain >= cut else 0.0
    assert found.loss_sum.item() == pytest.approx(loss, rel=1e-9)
    assert found.num_clipped == clipped
    found.loss_sum.backward()
    assert values.grad is not None
    assert values.grad.flatten().tolist() == pytest.approx([x for row in slopes for x in row], rel=1e-9, abs=1e-15)


def test_nothing_that_counts_is_nothing() -> None:
    zeros, no = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    loss = clipped_policy_loss(zeros, zeros.detach(), zeros.detach(), no, clip_range=0.2).loss_sum
    loss.backward()
    assert loss.item() == 0.0
    assert zeros.grad is not None
    assert not zeros.grad.any()


# Advantages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_the_double_sum(gamma: float, lam: float, seed: int) -> None:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}; V after the end is 0; R = A + V."""
    rewards, lengths = drawn(seed)
    values, _ = drawn(seed + 50)
    rewards_BT, values_BT = tensor(rewards), tensor(values)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask(lengths), gamma=gamma, gae_lambda=lam)
    assert torch.equal(rewards_BT, tensor(rewards))
    assert torch.equal(values_BT, tensor(values))
    assert advantages_BT.dtype == torch.float64
    for b, length in enumerate(lengths):
        v = [*values[b][:length], 0.0]
        delta = [rewards[b][t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(7):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) if t < length else 0.0
            assert advantages_BT[b, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
            value = values[b][t] if t < length else 0.0
            assert returns_BT[b, t].item() == pytest.approx(expected + value, rel=1e-9, abs=1e-12)


def test_gae_of_a_monte_carlo_return_is_what_comes_less_the_value() -> None:
    rewards, lengths = drawn(3)
    values, _ = drawn(4)
    advantages_BT, _ = gae(tensor(rewards), tensor(values), mask(lengths), gamma=1.0, gae_lambda=1.0)
    for b, length in enumerate(lengths):
        for t in range(length):
            expected = sum(rewards[b][t:length]) - values[b][t]
            assert advantages_BT[b, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("is_unbiased", [True, False])
@pytest.mark.parametrize("shifts", [True, False])
def test_whitening(shifts: bool, is_unbiased: bool) -> None:
    """(x - mean) rsqrt(var + 1e-8), the mean added again unless shifted; nothing leaks into padding (4.6)."""
    rows, lengths = drawn(6, scale=3.0)
    counted = [x for row, length in zip(rows, lengths, strict=True) for x in row[:length]]
    mean = sum(counted) / len(counted)
    variance = sum((x - mean) ** 2 for x in counted) / (len(counted) - is_unbiased)
    found_BT = whiten(with_nan_outside(rows, lengths), mask(lengths), shift_mean=shifts, unbiased=is_unbiased)
    for row, length, found in zip(rows, lengths, found_BT.tolist(), strict=True):
        expected = [(x - mean) / math.sqrt(variance + 1e-8) + (0.0 if shifts else mean) for x in row[:length]]
        assert found == pytest.approx([*expected, *[0.0] * (7 - length)], rel=1e-9, abs=1e-12)


def test_whitening_of_equal_values_and_its_gradient_beside_nan() -> None:
    values = torch.tensor([2.0, 2.0, math.nan], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([True, True, False])
    assert whiten(values, counts, shift_mean=True).tolist() == [0.0, 0.0, 0.0]
    assert whiten(values, counts, shift_mean=False).tolist() == [2.0, 2.0, 0.0]
    apart = torch.tensor([1.0, 4.0, math.nan], dtype=torch.float64, requires_grad=True)
    (whiten(apart, counts, shift_mean=True) * torch.tensor([1.0, 3.0, 5.0])).sum().backward()
    assert apart.grad is not None
    assert bool(torch.isfinite(apart.grad).all())
    assert apart.grad[2].item() == 0.0


# KL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_and_their_gradients(estimator: Estimator) -> None:
    formulas: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
        "k1": (lambda d: d, lambda d: 1.0),
        "k2": (lambda d: d * d / 2, lambda d: d),
        "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    }
    value, slope = formulas[estimator]
    d = [0.0, 1e-3, -0.7, 2.5, -30.0, 30.0]
    logp = torch.tensor([x - 2 for x in d], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(logp, torch.full((6,), -2.0, dtype=torch.float64), estimator=estimator)
    assert found.tolist() == pytest.approx([value(x) for x in d], rel=1e-9, abs=1e-12)  # no clamp (4.8)
    found.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([slope(x) for x in d], rel=1e-9, abs=1e-12)


def test_full_kl_where_words_are_impossible() -> None:
    inf = math.inf
    policy = torch.tensor([[math.log(0.25), math.log(0.75), -inf], [0.0, -inf, -inf]], dtype=torch.float64)
    other = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25)], [-inf, 0.0, -inf]], dtype=torch.float64)
    by_hand = 0.25 * math.log(0.5) + 0.75 * math.log(3)
    found = full_kl(policy.requires_grad_(), other)
    assert found.tolist() == [pytest.approx(by_hand, rel=1e-12), inf]
    found[0].backward()
    assert policy.grad is not None
    assert bool(torch.isfinite(policy.grad[0]).all())


def test_the_three_estimates_have_the_expectation_they_are_named_for() -> None:
    generator = torch.Generator().manual_seed(0)
    policy_V, other_V = (
        torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1) for _ in range(2)
    )
    exact = full_kl(policy_V, other_V).item()
    for estimator in ("k1", "k3"):
        mean = (policy_V.exp() * kl_estimate(policy_V, other_V, estimator=estimator)).sum().item()
        assert mean == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("kl", [0.0, 5.9, 6.0, 6.3, 100.0, -3.0])
def test_controllers(kl: float) -> None:
    adaptive = KlController(0.15, 6.0, 10_000).update(kl, num_steps=512)
    error = clip(kl / 6 - 1, -0.2, 0.2)
    assert adaptive.coef == pytest.approx(0.15 * (1 + error * 512 / 10_000), rel=1e-12)
    schulman = KlController(0.15, 6.0, 10_000, kind="schulman").update(kl, num_steps=512)
    factor = 2 if kl > 9 else 0.5 if kl < 4 else 1
    assert schulman.coef == pytest.approx(0.15 * factor, rel=1e-12)
    assert KlController(0.15, 6.0, 10_000, kind="fixed").update(kl, num_steps=512).coef == 0.15


# Optimizer -------------------------------------------------------------------------------------------------


def test_tensorflows_epsilon_gives_tensorflows_steps() -> None:
    """Section 3, 21: m / (sqrt(v) + eps) times lr sqrt(1 - b2^t) / (1 - b1^t), on a parameter of its own."""
    chosen = OptimizerSettings(betas=(0.9, 0.999), epsilon=1e-5, epsilon_form="tensorflow")
    parameter = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=chosen.betas, weight_decay=0.0)
    m = v = 0.0
    weight = 1.0
    for step, gradient in enumerate([1e-5, -3e-6, 2e-4, 0.0, 1e-7]):
        optimizer.param_groups[0]["eps"] = epsilon_at(step, chosen)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient * gradient
        t = step + 1
        weight -= 0.01 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + 1e-5)
        assert parameter.item() == pytest.approx(weight, rel=1e-12)


def test_warm_ups_of_the_papers() -> None:
    """LLaMA-2: 3 % and 5 steps at least; DPO: 150 steps; InstructGPT: from a tenth of the rate."""
    llama = OptimizerSettings(warmup_frac=0.03, min_warmup_steps=5, schedule="cosine", final_frac=0.1)
    assert [learning_rate_at(step, 50, llama) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate_at(5, 1000, llama) == pytest.approx(6 / 30)
    dpo = OptimizerSettings(warmup_frac=0.0, min_warmup_steps=150, schedule="constant")
    assert [learning_rate_at(step, 9999, dpo) for step in (0, 74, 149, 150)] == pytest.approx([1 / 150, 0.5, 1, 1])
    instruct = OptimizerSettings(warmup_frac=0.0, min_warmup_steps=10, warmup_from_frac=0.1, schedule="constant")
    rates = [learning_rate_at(step, 100, instruct) for step in range(11)]
    assert rates == pytest.approx([0.19, 0.28, 0.37, 0.46, 0.55, 0.64, 0.73, 0.82, 0.91, 1.0, 1.0])


def test_constants_of_the_details() -> None:
    """The published defaults."""
    chosen = PpoSettings()
    assert (chosen.gamma, chosen.gae_lambda, chosen.clip_range) == (1.0, 0.95, 0.2)
    assert (chosen.value_clip_range, chosen.value_coef, chosen.ppo_epochs) == (0.2, 0.1, 4)
    assert (chosen.kl_target_nats, chosen.kl_horizon_responses) == (6.0, 10_000)
    assert (chosen.whiten_advantages, chosen.whiten_variance) == (True, "biased")
    assert (chosen.missing_eos_value, chosen.kl_estimator) == (-1.0, "k1")
