"""Reward models and LLaMA-2's combination against loops over plain numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from scipy.special import logit
from sklearn.metrics import log_loss

from pipeline_lib.data.labels import stack_exchange_score
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.reward.contract import MARGINS
from pipeline_lib.losses.reward.normalization import mean_to_zero, normalization
from pipeline_lib.losses.reward.pairs import accuracy, bradley_terry, segment_preference
from pipeline_lib.losses.reward.safety import Safety
from pipeline_lib.rl.rewards import MissingEos, apply_missing_eos, token_rewards
from pipeline_lib.schema import Strength
from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.training.rewards.llama2 import Llama2, is_by_safety, whitened

Formula = Callable[[Sequence[float], Sequence[int]], float]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def sum_of_pairs(r: Sequence[float], ranks: Sequence[int], *, margin: float = 0.0, c: float = 0.0) -> float:
    return sum(softplus(r[j] - r[i] + margin) + c * (r[i] + r[j]) ** 2 for i, j in pairs(ranks))


def smoothed(r: Sequence[float], ranks: Sequence[int]) -> float:
    return sum(0.8 * softplus(r[j] - r[i]) + 0.2 * softplus(r[i] - r[j]) for i, j in pairs(ranks))


def best_of_k(r: Sequence[float], ranks: Sequence[int]) -> float:
    best = [i for i, rank in enumerate(ranks) if rank == min(ranks)]
    log_z = math.log(sum(math.exp(x) for x in r))
    return -sum(r[i] - log_z for i in best) / len(best)


def plackett_luce(r: Sequence[float], ranks: Sequence[int]) -> float:
    total = 0.0
    for k, own in enumerate(ranks):
        later = [r[k], *(r[j] for j, rank in enumerate(ranks) if rank > own)]
        total -= r[k] - math.log(sum(math.exp(x) for x in later))
    return total


CASES: list[tuple[dict[str, Any], str | None, Formula]] = [
    ({"name": "bradley_terry"}, None, sum_of_pairs),
    ({"name": "bradley_terry", "centring": 0.1}, None, lambda r, k: sum_of_pairs(r, k, c=0.1)),
    ({"name": "bradley_terry", "label_smoothing": 0.2}, None, smoothed),
    ({"name": "bradley_terry", "margins": "small"}, "better", lambda r, k: sum_of_pairs(r, k, margin=2 / 3)),
    ({"name": "bradley_terry", "margins": "large"}, "slightly", lambda r, k: sum_of_pairs(r, k, margin=1.0)),
    ({"name": "kwise"}, None, lambda r, k: sum_of_pairs(r, k) / math.comb(len(r), 2)),
    ({"name": "kwise", "divisor": "valid"}, None, lambda r, k: sum_of_pairs(r, k) / max(1, len(pairs(k)))),
    ({"name": "best_of_k"}, None, best_of_k),
    ({"name": "plackett_luce"}, None, plackett_luce),
]
every_case = pytest.mark.parametrize(
    ("spec", "strength", "formula"), CASES, ids=[" ".join(map(str, spec.values())) for spec, _, _ in CASES]
)


@pytest.mark.parametrize("count", [2, 4, 9])
@pytest.mark.parametrize("seed", range(3))
@every_case
def test_value_and_gradient(
    spec: dict[str, Any], strength: str | None, formula: Formula, count: int, seed: int
) -> None:
    draw = random.Random(seed)
    r = [draw.gauss(0, 3) for _ in range(count)]
    ranks = [draw.randint(1, 3) for _ in range(count)]
    ranks[0] = 0  # not all tie
    scores_K = torch.tensor(r, dtype=torch.float64, requires_grad=True)
    loss, _ = REWARD_LOSSES.build(spec).of_prompt(scores_K, torch.tensor(ranks), strength=strength, weight=1.0)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(formula(r, ranks), rel=1e-9, abs=1e-12)
    loss.backward()
    step = 1e-5
    slopes = [
        (formula([x + step * (i == k) for i, x in enumerate(r)], ranks)
         - formula([x - step * (i == k) for i, x in enumerate(r)], ranks)) / (2 * step)
        for k in range(count)
    ]  # fmt: skip
    assert scores_K.grad is not None
    assert scores_K.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-7)


def test_every_reward_loss_has_a_formula_here() -> None:
    assert {spec["name"] for spec, _, _ in CASES} == set(REWARD_LOSSES)


def test_what_a_step_is_divided_by() -> None:
    """Bradley-Terry by pairs, K-wise by prompts, ties as C(K, 2) has them."""
    scores_K, rank_K = torch.zeros(4), torch.tensor([1, 2, 2, 3])  # 5 pairs of 6
    divisors = {
        name: REWARD_LOSSES.build({"name": name}).of_prompt(scores_K, rank_K, weight=2.0)[1] for name in REWARD_LOSSES
    }
    assert divisors == {"bradley_terry": 10.0, "kwise": 2.0, "plackett_luce": 2.0, "best_of_k": 2.0}
    loss, _ = REWARD_LOSSES.build({"name": "kwise"}).of_prompt(scores_K, rank_K)
    assert loss.item() == pytest.approx(5 / 6 * math.log(2), rel=1e-6)


def test_margins_are_those_of_table_27() -> None:
    words = get_args(Strength)
    assert [MARGINS["small"][word] for word in words] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [MARGINS["large"][word] for word in words] == [3, 2, 1, 0]


def test_ties_of_scores_are_not_accurate() -> None:
    better, worse = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    assert accuracy(better, worse).item() == pytest.approx(1 / 3)


def test_far_scores_stay_finite() -> None:
    far = torch.tensor([1e4, -1e4], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry(far, -far.detach())
    assert loss.tolist() == [0.0, 2e4]
    loss.sum().backward()
    assert far.grad is not None
    assert far.grad.tolist() == [0.0, -1.0]


def test_segments_are_judged_by_their_sums() -> None:
    draw = random.Random(0)
    first, second = ([[draw.gauss(0, 1) for _ in range(5)] for _ in range(8)] for _ in range(2))
    share = [draw.choice([0.0, 0.5, 1.0]) for _ in range(8)]
    found = segment_preference(*(torch.tensor(each, dtype=torch.float64) for each in (first, second, share)))
    for a, b, mu, value in zip(first, second, share, found.tolist(), strict=True):
        p = math.exp(sum(a)) / (math.exp(sum(a)) + math.exp(sum(b)))
        assert value == pytest.approx(-mu * math.log(p) - (1 - mu) * math.log(1 - p), rel=1e-9)


def test_normalisation() -> None:
    """Ziegler: gain = sigma_T / sigma_D, bias = mu_T - gain mu_D, E[x^2] - E[x]^2; InstructGPT: mean 0, unscaled."""
    values = [0.3, -1.2, 2.5, 0.9, 0.9]
    mean = sum(values) / 5
    deviation = math.sqrt(sum(x * x for x in values) / 5 - mean * mean)
    scores = torch.tensor(values, dtype=torch.float64)
    assert normalization(scores) == pytest.approx((1 / deviation, -mean / deviation), rel=1e-9)
    gain, bias = normalization(scores, target_mean=0.5, target_std=2.0)
    assert (gain, bias) == pytest.approx((2 / deviation, 0.5 - 2 * mean / deviation), rel=1e-9)
    assert mean_to_zero(scores) == pytest.approx((1.0, -mean), rel=1e-12)
    for odd in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="all finite"):
            mean_to_zero(torch.tensor(odd))


@pytest.mark.parametrize(
    ("upvotes", "is_accepted", "expected"),
    [(0, False, 0), (0, True, 1), (1, False, 1), (5, False, 3), (5, True, 4), (1000, True, 11), (-1, False, -1)],
)
def test_upvotes(upvotes: int, is_accepted: bool, expected: int) -> None:
    """round(log2(1 + upvotes)), + 1 if accepted, -1 if negative: log2 6 = 2.58, log2 1001 = 9.97."""
    assert stack_exchange_score(upvotes, is_accepted=is_accepted) == expected


# The safety loss -----------------------------------------------------------------------------------------


def test_safety_loss_against_the_cross_entropy_of_another_library() -> None:
    scores = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64, requires_grad=True)
    is_safe = (True, False, False)
    found = Safety(coef=0.5).of_prompt(scores, is_safe, weight=3.0)
    probability = torch.sigmoid(scores.detach()).tolist()
    assert found.item() == pytest.approx(3 * 0.5 * 3 * log_loss(is_safe, probability), rel=1e-9)
    found.backward()
    assert scores.grad is not None
    apart = [1.5 * (p - safe) for p, safe in zip(probability, is_safe, strict=True)]
    assert scores.grad.tolist() == pytest.approx(apart, rel=1e-9)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (("best-safe",), (False, True, False)), (("all-safe", "other"), (True,) * 3), (("none-safe",), (False,) * 3),
        (("other",), ()), ((), ()),
    ],
)  # fmt: skip
def test_what_tags_say_of_safety(tags: tuple[str, ...], expected: tuple[bool, ...]) -> None:
    assert Safety().labels((2, 1, 3), tags) == expected


def test_tags_that_say_two_things() -> None:
    with pytest.raises(ValueError, match="say two things"):
        Safety().labels((1, 2), ("all-safe", "none-safe"))
    with pytest.raises(ValueError, match="'x' is named twice"):
        Safety(best_safe_tags=("x",), all_safe_tags=("x",))


# LLaMA-2's combination -------------------------------------------------------------------------------------


def whiten_by_loop(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


def test_the_threshold_is_on_raw_logits_and_strict() -> None:
    edge = float(logit(0.15))
    assert edge == pytest.approx(-1.7346, abs=1e-4)
    just_below = math.nextafter(edge, -math.inf)
    by_safety = is_by_safety([just_below - 1e-12, edge + 1e-12, 5.0, 5.0], [False, False, True, False],
                             threshold_frac=0.15)  # fmt: skip
    assert by_safety == [True, False, True, False]
    exactly = math.log(0.15 / 0.85)
    assert is_by_safety([exactly], [False], threshold_frac=0.15) == [False]


@pytest.mark.parametrize("seed", range(4))
def test_piecewise_and_whitened(seed: int) -> None:
    draw = random.Random(seed)
    helpful, safe = ([draw.gauss(0, 4) for _ in range(12)] for _ in range(2))
    asks = [draw.random() < 0.3 for _ in range(12)]
    samples = [
        Sample(str(n), (), "", None, is_finished=True, tags=("safe",) if ask else ("helpful",))  # type: ignore[arg-type]
        for n, ask in enumerate(asks)
    ]

    def scores_of(name: str, trees: Sequence[Any], *, is_raw: bool) -> list[float]:
        assert is_raw
        assert len(trees) == 12
        return {"reward": helpful, "safe": safe}[name]

    chosen = [s if ask or 1 / (1 + math.exp(-s)) < 0.15 else h for s, h, ask in zip(safe, helpful, asks, strict=True)]
    found = Llama2().score(samples, Resources(scores_of=scores_of))
    assert list(found) == pytest.approx(whiten_by_loop(chosen), rel=1e-9)
    assert list(Llama2(whiten=False).score(samples, Resources(scores_of=scores_of))) == chosen


def test_whitening_of_one_value_and_of_equal_ones_is_0() -> None:
    assert whitened([3.0]) == [0.0]
    assert whitened([2.0, 2.0]) == [0.0, 0.0]
    assert whitened([]) == []


# Rewards a token -------------------------------------------------------------------------------------------


def test_a_missing_end_replaces_or_is_subtracted() -> None:
    """Methods 4.7: both modes."""
    score_B, is_finished_B = torch.tensor([2.0, 3.0, -4.0]).double(), torch.tensor([True, False, False])
    expected = {"keep": [2.0, 3.0, -4.0], "replace": [2.0, -1.0, -1.0], "penalty": [2.0, 2.0, -5.0]}
    assert set(expected) == set(get_args(MissingEos))
    for mode, values in expected.items():
        found_B = apply_missing_eos(score_B, is_finished_B, mode=mode, value=-1.0)  # type: ignore[arg-type]
        assert found_B.tolist() == values
        assert found_B.dtype == torch.float64


def test_the_score_stands_at_the_last_response_token() -> None:
    """Methods 4.5: the last token, not the place after it; padding stays 0, whatever stands there."""
    kl_BT = torch.tensor([[0.5, -0.25, math.nan], [0.1, 0.2, 0.4], [1.0, math.inf, math.nan]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    found_BT = token_rewards(kl_BT, torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64), mask_BT, kl_coef=0.1)
    expected = [[-0.05, 0.025 + 2, 0.0], [-0.01, -0.02, -0.04 - 1], [-0.1 + 0.5, 0.0, 0.0]]
    for row, wanted in zip(found_BT.tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-12)
    assert found_BT.dtype == torch.float64
