"""Corners of every objective: one token, all ties, one response, log-probabilities and logits of 1e4, half smoothing.

Expected numbers are limits worked out by hand; in them exponentials of 1e3 are 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.preference.contract import PairLogps, RankedLogps, UnpairedLogps
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.tokens import (
    HeadStates,
    full_kl_from_hidden,
    mean_logps_from_hidden,
    smoothed_nll,
    token_logps_from_hidden,
)

every_format = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
FAR = 1e4


def build(name: str, **parameters: Any) -> Any:
    return PREFERENCE_LOSSES.build({"name": name, **parameters})


def pair(chosen: float, rejected: float, *, tokens: int = 1, dtype: torch.dtype = torch.float64) -> PairLogps:
    """One pair of responses of so many tokens; the reference finds both equally likely."""
    chosen_B, rejected_B = (torch.tensor([value], dtype=dtype, requires_grad=True) for value in (chosen, rejected))
    ref_B, tokens_B = torch.tensor([-FAR], dtype=dtype), torch.tensor([tokens])
    return PairLogps(chosen_B, rejected_B, ref_B, ref_B, tokens_B, tokens_B)


def ranked(logps: list[float], ranks: list[int], rewards: list[float], *, dtype: torch.dtype) -> RankedLogps:
    """Responses of one token each, against a reference that finds all equally likely."""
    logp_K = torch.tensor(logps, dtype=dtype, requires_grad=True)
    return RankedLogps(
        logp_K, torch.full_like(logp_K, -3.0).detach(), torch.ones(len(logps), dtype=torch.long), torch.tensor(ranks),
        torch.tensor(rewards, dtype=dtype),
    )  # fmt: skip


# Pairs: h = 1e4 for and against the chosen response --------------------------------------------------------

# The loss where the chosen response has all the probability (log-probability 0, the other -1e4), and turned round.
LIMITS: dict[str, tuple[dict[str, Any], float, float]] = {
    "dpo": ({"beta": 0.1}, 0.0, 1000.0),
    "robust": ({"beta": 0.1, "label_smoothing": 0.2}, -0.2 * 1000 / 0.6, 0.8 * 1000 / 0.6),
    "ipo": ({"tau": 0.5}, (FAR - 1) ** 2, (FAR + 1) ** 2),
    "hinge": ({"beta": 0.1}, 0.0, 1001.0),
    "length_normalized": ({"beta": 2.0}, 0.0, 2e4),
    "r_dpo": ({"beta": 0.1, "alpha": 0.05}, 0.0, 1000.0),  # of equal length
    "odpo": ({"beta": 0.1, "offset": 5.0}, 0.0, 1005.0),
    "simpo": ({"beta": 2.0, "gamma": 0.5}, 0.0, 2e4 + 0.5),
    "cpo": ({"beta": 0.1}, 0.0, 1000.0 + FAR),  # and the cross-entropy of the chosen response
    "exo": ({"beta": 0.1, "label_smoothing": 0.01}, -math.log(0.99), -math.log(0.01)),
    # The log-ratio of the likely response is 1e4, that of the other 0.
    "nca": ({"beta": 0.1}, 0.5 * (1000 + math.log(2)), math.log(2) + 0.5 * (math.log(2) + 1000)),
    "sppo": ({"beta": 0.5}, (FAR - 1) ** 2 + 1, 1 + (FAR + 1) ** 2),
    "apo_zero": ({"beta": 0.1}, 0.5, 0.5 + 1),
    "apo_down": ({"beta": 0.1}, 1.0, 0.5 + 1),
}


@every_format
@pytest.mark.parametrize("name", LIMITS)
def test_pairs_of_one_token_at_the_ends_of_probability(name: str, dtype: torch.dtype) -> None:
    parameters, won, lost = LIMITS[name]
    for chosen, rejected, expected in ((0.0, -FAR, won), (-FAR, 0.0, lost)):
        given = pair(chosen, rejected, dtype=dtype)
        loss_B = build(name, **parameters).per_pair(given)
        assert loss_B.dtype == dtype
        assert loss_B.tolist() == pytest.approx([expected], rel=1e-6, abs=1e-6)
        loss_B.sum().backward()
        for values in (given.chosen_B, given.rejected_B):
            assert values.grad is not None
            assert bool(values.grad.isfinite().all())


@every_format
def test_orpo_of_certain_and_of_impossible_responses(dtype: torch.dtype) -> None:
    """P = 1 is taken for 1 - epsilon: log odds of -log(epsilon); P = e^-1e4 has log odds of -1e4."""
    edge = -math.log(torch.finfo(dtype).eps)
    for chosen, rejected, expected in ((0.0, -FAR, 0.0), (-FAR, 0.0, FAR + 0.25 * (FAR + edge))):
        given = pair(chosen, rejected, dtype=dtype)
        loss_B = build("orpo", lam=0.25).per_pair(given)
        assert loss_B.tolist() == pytest.approx([expected], rel=1e-5, abs=1e-6)
        loss_B.sum().backward()
        for values in (given.chosen_B, given.rejected_B):
            assert values.grad is not None
            assert bool(values.grad.isfinite().all())


def test_every_loss_on_pairs_has_its_limits_here() -> None:
    of_pairs = {name for name in PREFERENCE_LOSSES if PREFERENCE_LOSSES[name].form == "pair"}  # type: ignore[attr-defined]
    assert of_pairs == {*LIMITS, "orpo"}


@pytest.mark.parametrize("name", ["dpo", "cpo", "robust", "exo"])
def test_half_of_the_labels_flipped_says_nothing_and_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        build(name, label_smoothing=0.5)
    with pytest.raises(ConfigError, match="label_smoothing"):
        REWARD_LOSSES.build({"name": "bradley_terry", "label_smoothing": 0.5})
    # Just below, both directions of a cDPO pair cost nearly the same.
    almost = build("dpo", beta=1.0, label_smoothing=0.4999)
    apart = almost.per_pair(pair(-2.0, -3.0)) - almost.per_pair(pair(-3.0, -2.0))
    assert apart.item() == pytest.approx(-2e-4, rel=1e-6)  # -(1 - 2e) h


# Lists -----------------------------------------------------------------------------------------------------

TIED = [-1.0, -5.0, -3.0]
# With nothing but ties only the term on the best response is left: the mean of -1, -5 and -3 is -3.
ALL_TIES: list[tuple[dict[str, Any], float]] = [
    ({"name": "plackett_luce"}, 0.0),
    ({"name": "plackett_luce", "sft_coef": 0.5}, 1.5),
    ({"name": "rrhf", "rank_coef": 100.0}, 3.0),
    ({"name": "pro", "sft_weight": 0.05}, 0.05 * 4 * 3.0),
    ({"name": "slic", "kind": "rank", "lam": 0.5}, 1.5),
    ({"name": "slic", "kind": "margin", "lam": 0.5}, 1.5),
    ({"name": "slic", "kind": "list", "lam": 0.5}, 1.5),
    ({"name": "slic", "kind": "reward", "lam": 0.5}, -2.0 + 1.5),  # the reward that all have
    ({"name": "slic", "kind": "rank", "reg": "none"}, 0.0),
]


@every_format
@pytest.mark.parametrize(("spec", "expected"), ALL_TIES, ids=lambda value: str(value))
def test_lists_of_nothing_but_ties(spec: dict[str, Any], expected: float, dtype: torch.dtype) -> None:
    given = ranked(TIED, [2, 2, 2], [2.0, 2.0, 2.0], dtype=dtype)
    loss = PREFERENCE_LOSSES.build(spec).of_list(given)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
    loss.backward()
    assert given.logp_K.grad is not None
    # Each of the three best has a third of the term's gradient, which is its value over -3.
    share = (expected + 2.0 if spec.get("kind") == "reward" else expected) / 9
    assert given.logp_K.grad.tolist() == pytest.approx([-share] * 3, rel=1e-5, abs=1e-7)


# Best first: 0, -1e4 and -1e4 in the right order, and the worst one likely instead.
LISTS: list[tuple[dict[str, Any], float, float]] = [
    ({"name": "plackett_luce", "beta": 0.1}, math.log(2), 1000 + 1000),
    ({"name": "rrhf", "rank_coef": 1.0}, 0.0, 2 * FAR + FAR),
    # 1 / T is the gap of rewards; in the right order only the second and the third are as likely as each other.
    ({"name": "pro", "sft_weight": 0.0}, math.log(2), 2 * FAR + FAR),
    ({"name": "slic", "kind": "rank", "delta": 1.0, "reg": "none"}, 1 / 3, (1 + 2 * (1 + FAR)) / 3),
    ({"name": "slic", "kind": "margin", "delta": 1.0, "reg": "none"}, 1 / 3, (1 + 2 + FAR + 1 + FAR) / 3),
    ({"name": "slic", "kind": "list", "delta": 1.0, "reg": "none"}, 1.0, 1 + 2 + FAR + 1 + FAR),
    ({"name": "slic", "kind": "reward", "reg": "none"}, -3.0, -1.0),
]


@every_format
@pytest.mark.parametrize(("spec", "right", "wrong"), LISTS, ids=lambda value: str(value))
def test_lists_at_the_ends_of_probability(spec: dict[str, Any], right: float, wrong: float, dtype: torch.dtype) -> None:
    for logps, expected in (([0.0, -FAR, -FAR], right), ([-FAR, -FAR, 0.0], wrong)):
        given = ranked(logps, [1, 2, 3], [3.0, 2.0, 1.0], dtype=dtype)
        loss = PREFERENCE_LOSSES.build(spec).of_list(given)
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        loss.backward()
        assert given.logp_K.grad is not None
        assert bool(given.logp_K.grad.isfinite().all())


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSSES if PREFERENCE_LOSSES[name].form == "list"])  # type: ignore[attr-defined]
def test_a_list_of_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="K >= 2"):
        build(name).of_list(ranked([-1.0], [1], [1.0], dtype=torch.float64))


# Single responses ------------------------------------------------------------------------------------------


@every_format
def test_kto_without_mismatched_rows_and_of_one_class_alone(dtype: torch.dtype) -> None:
    logp_B = torch.tensor([0.0, -FAR, -2 * FAR], dtype=dtype, requires_grad=True)
    none_M = torch.zeros(0, dtype=dtype)
    given = UnpairedLogps(logp_B, torch.full((3,), -FAR, dtype=dtype), torch.tensor([False] * 3), none_M, none_M)
    loss = build("kto", beta=0.1, lambda_u=2.0)
    # Undesirable: 2 sigma(0.1 c) with c = 1e4, 0 and -1e4.
    assert loss.per_response(given).tolist() == pytest.approx([2.0, 1.0, 0.0], abs=1e-6)
    good = replace(given, is_desirable_B=torch.tensor([True] * 3))
    found_B = loss.per_response(good)
    assert found_B.tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-6)
    found_B.sum().backward()
    assert logp_B.grad is not None
    assert logp_B.grad.tolist() == pytest.approx([0.0, -0.025, 0.0], abs=1e-7)


# Reward models ---------------------------------------------------------------------------------------------

# Scores 1e4, 0 and -1e4 in the right order and the wrong one.
SCORES: list[tuple[dict[str, Any], float, float]] = [
    ({"name": "bradley_terry"}, 0.0, FAR + FAR + 2 * FAR),
    ({"name": "bradley_terry", "label_smoothing": 0.4}, 0.4 * 4 * FAR, 0.6 * 4 * FAR),
    ({"name": "kwise"}, 0.0, 4 * FAR / 3),
    ({"name": "plackett_luce"}, 0.0, 2 * FAR + FAR),
    ({"name": "best_of_k"}, 0.0, 2 * FAR),
]


@every_format
@pytest.mark.parametrize(("spec", "right", "wrong"), SCORES, ids=lambda value: str(value))
def test_scores_of_1e4(spec: dict[str, Any], right: float, wrong: float, dtype: torch.dtype) -> None:
    for ranks, expected in (([1, 2, 3], right), ([3, 2, 1], wrong)):
        scores_K = torch.tensor([FAR, 0.0, -FAR], dtype=dtype, requires_grad=True)
        loss, _ = REWARD_LOSSES.build(spec).of_prompt(scores_K, torch.tensor(ranks))
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
        loss.backward()
        assert scores_K.grad is not None
        assert bool(scores_K.grad.isfinite().all())


def test_every_reward_loss_has_its_limits_here() -> None:
    assert {spec["name"] for spec, _, _ in SCORES} == set(REWARD_LOSSES)


# Tokens ----------------------------------------------------------------------------------------------------


def extreme_head(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of exactly 1e4, 0 and -1e4 for each of two tokens, and labels at the top and the bottom."""
    hidden_ND = torch.tensor([[100.0, 0.0], [0.0, 100.0]], dtype=dtype, requires_grad=True)
    weight_VD = torch.tensor([[100.0, -100.0], [0.0, 0.0], [-100.0, 100.0]], dtype=dtype, requires_grad=True)
    return hidden_ND, weight_VD, torch.tensor([0, 0])


@every_format
@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_cross_entropy_of_logits_of_1e4(dtype: torch.dtype, smoothing: float) -> None:
    hidden_ND, weight_VD, label_N = extreme_head(dtype)
    logp_N, entropy_N = token_logps_from_hidden(hidden_ND, weight_VD, label_N, chunk_tokens=1, with_entropy=True)
    mean_N = mean_logps_from_hidden(hidden_ND, weight_VD, label_N, logp_N)
    found_N = smoothed_nll(logp_N, mean_N, label_smoothing=smoothing)
    # -log p of the label is 0 and 2e4; the mean of (0, 1e4, 2e4) is 1e4 for both tokens.
    expected = [smoothing * FAR, (1 - smoothing) * 2 * FAR + smoothing * FAR]
    assert found_N.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    theirs_N = cross_entropy(hidden_ND @ weight_VD.T, label_N, reduction="none", label_smoothing=smoothing)
    for own, other in zip(*(torch.autograd.grad(each.sum(), [hidden_ND, weight_VD]) for each in (found_N, theirs_N)),
                          strict=True):  # fmt: skip
        assert bool(own.isfinite().all())
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-4)
    assert entropy_N is not None
    assert entropy_N.tolist() == [0.0, 0.0]


@every_format
def test_the_kl_of_certain_distributions(dtype: torch.dtype) -> None:
    """From a certain distribution to its opposite: 2e4 nats; to itself 0."""
    hidden_ND, weight_VD, _ = extreme_head(dtype)
    policy, ref_ND, ref_VD = HeadStates(hidden_ND, weight_VD), hidden_ND.detach(), weight_VD.detach()
    same_N = full_kl_from_hidden(policy, HeadStates(ref_ND, ref_VD), chunk_tokens=1)
    assert same_N.tolist() == [0.0, 0.0]
    turned_N = full_kl_from_hidden(policy, HeadStates(ref_ND.flip(0), ref_VD), chunk_tokens=2)
    assert turned_N.tolist() == pytest.approx([2 * FAR, 2 * FAR], rel=1e-6)
    for gradient in torch.autograd.grad((same_N + turned_N).sum(), [hidden_ND, weight_VD]):
        assert bool(gradient.isfinite().all())
