"""Cross-entropy and divergences of tokens against torch on full logits."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from pipeline_lib.losses.cross_entropy import CrossEntropy
from pipeline_lib.losses.tokens import (
    HeadStates,
    full_kl_from_hidden,
    masked_mean,
    mean_logps_from_hidden,
    smoothed_nll,
    token_logps_from_hidden,
)

N, D, V = 7, 5, 11


def head(seed: int, *, has_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weights, a bias and labels in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, weight_VD = (
        (2 * torch.randn(rows, D, generator=generator, dtype=torch.float64)).requires_grad_() for rows in (N, V)
    )
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_() if has_bias else None
    return hidden_ND, weight_VD, bias_V, torch.randint(0, V, (N,), generator=generator)


def logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    plain_NV = hidden_ND @ weight_VD.T
    return (plain_NV if bias_V is None else plain_NV + bias_V) / temperature


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize(("chunk", "has_bias", "temperature"), list(product((1, 3, 100), (True, False), (1.0, 0.7))))
def test_token_logps_are_cross_entropy(chunk: int, has_bias: bool, temperature: float) -> None:
    hidden_ND, weight_VD, bias_V, label_N = head(1, has_bias=has_bias)
    inputs = [each for each in (hidden_ND, weight_VD, bias_V) if each is not None]
    found_N, entropy_N = token_logps_from_hidden(
        hidden_ND, weight_VD, label_N, head_bias_V=bias_V, chunk_tokens=chunk, temperature=temperature,
        with_entropy=True,
    )  # fmt: skip
    whole_NV = logits(hidden_ND, weight_VD, bias_V, temperature)
    expected_N = -cross_entropy(whole_NV, label_N, reduction="none")
    torch.testing.assert_close(found_N, expected_N, rtol=1e-12, atol=1e-12)
    weights_N = torch.linspace(-1, 2, N, dtype=torch.float64)
    pairs = zip(gradients(found_N @ weights_N, inputs), gradients(expected_N @ weights_N, inputs), strict=True)
    for own, theirs in pairs:
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)
    assert entropy_N is not None
    probability_NV = whole_NV.detach().softmax(-1)
    torch.testing.assert_close(entropy_N, torch.distributions.Categorical(probability_NV).entropy(), rtol=1e-9, atol=0)


def test_gradcheck_of_the_chunked_head() -> None:
    hidden_ND, weight_VD, bias_V, label_N = head(2)
    assert bias_V is not None

    def logps(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_logps_from_hidden(h, w, label_N, head_bias_V=b, chunk_tokens=3, temperature=1.3)[0]

    def kl(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ref_ND, ref_VD, _, _ = head(5)
        return full_kl_from_hidden(HeadStates(h, w, b), HeadStates(ref_ND, ref_VD), chunk_tokens=3, temperature=1.3)

    for function in (logps, kl):
        assert torch.autograd.gradcheck(function, (hidden_ND, weight_VD, bias_V))


@pytest.mark.parametrize(("chunk", "temperature"), list(product((2, 100), (1.0, 0.5))))
def test_full_kl_against_torchs(chunk: int, temperature: float) -> None:
    hidden_ND, weight_VD, bias_V, _ = head(3)
    ref_ND, ref_VD, ref_V, _ = head(4)
    found_N = full_kl_from_hidden(
        HeadStates(hidden_ND, weight_VD, bias_V), HeadStates(ref_ND, ref_VD, ref_V), chunk_tokens=chunk,
        temperature=temperature,
    )  # fmt: skip
    own_NV, ref_NV = (
        logits(*each, temperature).log_softmax(-1) for each in ((hidden_ND, weight_VD, bias_V), (ref_ND, ref_VD, ref_V))
    )
    expected_N = kl_div(ref_NV.detach(), own_NV, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-12)
    own, theirs = (torch.autograd.grad(each.sum(), hidden_ND, retain_graph=True)[0] for each in (found_N, expected_N))
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(found_N.sum(), ref_ND, allow_unused=True)[0] is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    hidden_ND, weight_VD, bias_V, label_N = head(6)
    logp_N, _ = token_logps_from_hidden(hidden_ND, weight_VD, label_N, head_bias_V=bias_V, chunk_tokens=4)
    mean_N = mean_logps_from_hidden(hidden_ND, weight_VD, label_N, logp_N, head_bias_V=bias_V)
    found_N = smoothed_nll(logp_N, mean_N, label_smoothing=smoothing)
    whole_NV = logits(hidden_ND, weight_VD, bias_V, 1.0)
    expected_N = cross_entropy(whole_NV, label_N, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-12)
    inputs = [hidden_ND, weight_VD]
    for own, theirs in zip(gradients(found_N.sum(), inputs), gradients(expected_N.sum(), inputs), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_a_mean_over_what_counts() -> None:
    values = torch.tensor([1.0, math.nan, 3.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True])
    mean = masked_mean(values, mask)
    assert mean.item() == 2.0
    mean.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match="empty"):
        masked_mean(values, torch.zeros(3, dtype=torch.bool))


# Reductions: rows of turns of tokens, with a loss each -----------------------------------------------------

Row = tuple[float, list[list[float]]]
"""A row's weight, and the losses of each turn's tokens."""


def rows(seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [
        (draw.choice([0.1, 1.0, 2.5]), [[draw.uniform(0, 4) for _ in range(draw.randint(1, 6))] for _ in range(turns)])
        for turns in (1, 3, 2, 1)
    ]


def reduced(objective: CrossEntropy, given: list[Row]) -> float:
    """What the recipe makes of a step: the weighted sum over what every row adds to the divisor."""
    total = divisor = 0.0
    for weight, turns in given:
        counts = tuple(len(turn) for turn in turns)
        for turn, each in zip(turns, objective.turn_weights(counts, row_weight=weight), strict=True):
            total += each * sum(turn)
        divisor += objective.divisor(counts, row_weight=weight)
    return total if objective.reduction == "sum" else total / divisor


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_reductions(seed: int) -> None:
    given = rows(seed)
    tokens = [(w, x) for w, turns in given for turn in turns for x in turn]
    weights = sum(w for w, _ in given)
    expected = {
        # sum(w CE) / sum(w) over the whole step (2.1, 2.14).
        "token_mean": sum(w * x for w, x in tokens) / sum(w for w, _ in tokens),
        # Chain of Hindsight: the mean of row means (2.13).
        "sample_mean": sum(w * mean([x for turn in turns for x in turn]) for w, turns in given) / weights,
        # C-RLFT's seq_level_weight: every turn alike however long it is.
        "turn_mean": sum(w * mean(turn) for w, turns in given for turn in turns)
        / sum(w * len(turns) for w, turns in given),
        "sum": sum(w * x for w, x in tokens),
    }
    for reduction, value in expected.items():
        assert reduced(CrossEntropy(reduction=reduction), given) == pytest.approx(value, rel=1e-12)


def test_token_mean_is_the_default() -> None:
    assert CrossEntropy().reduction == "token_mean"
    assert CrossEntropy().label_smoothing == 0.0


def test_a_row_without_a_counted_token_weighs_nothing() -> None:
    for reduction in ("token_mean", "sample_mean", "turn_mean"):
        assert CrossEntropy(reduction=reduction).divisor((), row_weight=2.0) == 0.0
