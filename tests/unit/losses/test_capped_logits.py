"""Logits under a cap, c tanh(z / c), in chunks: values and gradients against torch on all logits."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.losses.tokens import (
    HeadStates,
    full_kl_from_hidden,
    mean_logps_from_hidden,
    smoothed_nll,
    token_logps_from_hidden,
)

CAP = 2.5


def inputs(seed: int = 0, *, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states, a head, its bias and labels; logits of a few times the cap."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((7, 5), (11, 5), (11,))
    )
    return hidden, weight, bias, torch.randint(0, 11, (7,), generator=generator)


def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor, *, cap: float | None, temperature: float) -> Tensor:
    logits = hidden @ weight.T + bias
    capped = logits if cap is None else torch.tanh(logits / cap) * cap
    return torch.log_softmax(capped / temperature, dim=-1)


def assert_same_gradients(found: Tensor, expected: Tensor, learned: list[Tensor]) -> None:
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype)
    own, theirs = (torch.autograd.grad((each * weights).sum(), learned) for each in (found, expected))
    for one, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("chunk", "temperature", "is_head_learned"), list(product((1, 3, 100), (1.0, 0.7), (True, False)))
)
def test_logps_and_entropy_are_torchs(chunk: int, temperature: float, is_head_learned: bool) -> None:
    *parts, labels = inputs()
    learned = parts if is_head_learned else parts[:1]
    for part in learned:
        part.requires_grad_()
    found, entropy = token_logps_from_hidden(
        parts[0], parts[1], labels, head_bias_V=parts[2], chunk_tokens=chunk, temperature=temperature, softcap=CAP,
        with_entropy=True,
    )  # fmt: skip
    logp = log_softmax(*parts, cap=CAP, temperature=temperature)
    expected = logp.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1).detach(), rtol=1e-12, atol=1e-12)
    assert_same_gradients(found, expected, learned)
    # The cap is felt: without it the numbers are others.
    assert float((log_softmax(*parts, cap=None, temperature=temperature) - logp).detach().abs().max()) > 0.1


@pytest.mark.parametrize(("chunk", "smoothing"), list(product((2, 100), (0.0, 0.1, 0.5, 1.0))))
def test_label_smoothing_is_torchs(chunk: int, smoothing: float) -> None:
    *parts, labels = inputs(1)
    for part in parts:
        part.requires_grad_()
    how: dict[str, Any] = {"head_bias_V": parts[2], "softcap": CAP, "temperature": 1.3, "chunk_tokens": chunk}
    logps, _ = token_logps_from_hidden(parts[0], parts[1], labels, **how)
    means = mean_logps_from_hidden(parts[0], parts[1], labels, logps, **how)
    found = smoothed_nll(logps, means, label_smoothing=smoothing)
    logits = CAP * torch.tanh((parts[0] @ parts[1].T + parts[2]) / CAP) / 1.3
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found, expected, parts)


@pytest.mark.parametrize(("cap", "ref_cap"), [(CAP, CAP), (CAP, None), (None, 1.5)])
@pytest.mark.parametrize("is_head_learned", [True, False])
def test_the_kl_takes_each_models_own_cap(cap: float | None, ref_cap: float | None, is_head_learned: bool) -> None:
    *parts, _ = inputs(2)
    *ref, _ = inputs(3)
    learned = parts if is_head_learned else parts[:1]
    for part in learned:
        part.requires_grad_()
    found = full_kl_from_hidden(
        HeadStates(*parts, softcap=cap), HeadStates(*ref, softcap=ref_cap), chunk_tokens=3, temperature=0.8
    )
    logp = log_softmax(*parts, cap=cap, temperature=0.8)
    logq = log_softmax(*ref, cap=ref_cap, temperature=0.8)
    expected = (logp.exp() * (logp - logq)).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found, expected, learned)


def test_gradcheck() -> None:
    *parts, labels = inputs(4)
    for part in parts:
        part.requires_grad_()

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps_from_hidden(hidden, weight, labels, head_bias_V=bias, chunk_tokens=3, softcap=CAP)[0]

    assert torch.autograd.gradcheck(logps, parts)


def test_extreme_logits_end_at_the_cap() -> None:
    """Far beyond the cap every logit is the cap or its negative: two levels, and no gradient is left."""
    *parts, labels = inputs(5, scale=1e4, dtype=torch.float32)
    parts[0].requires_grad_()
    found, entropy = token_logps_from_hidden(
        parts[0], parts[1], labels, head_bias_V=parts[2], chunk_tokens=4, softcap=30.0, with_entropy=True
    )
    found.sum().backward()
    assert entropy is not None
    above = (parts[0] @ parts[1].T + parts[2] > 0).detach()
    num_above = above.sum(-1).double()
    # log(k e^30 + (11 - k) e^-30) with k logits at the cap
    normalizer = torch.logaddexp(num_above.log() + 30, (11 - num_above).log() - 30)
    expected = torch.where(above.gather(1, labels[:, None])[:, 0], 30.0, -30.0) - normalizer
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert parts[0].grad is not None
    assert float(parts[0].grad.abs().max()) == 0.0


def test_bf16_keeps_the_cap_in_float32() -> None:
    *parts, labels = inputs(6, dtype=torch.bfloat16)
    found, _ = token_logps_from_hidden(
        parts[0], parts[1], labels, head_bias_V=parts[2], chunk_tokens=4, softcap=CAP
    )  # fmt: skip
    wide = [part.float() for part in parts]
    expected = log_softmax(*wide, cap=CAP, temperature=1.0).gather(1, labels[:, None])[:, 0]
    assert found.dtype == torch.float32
    # What the product loses in 8 bits, no more.
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-4)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_is_above_0(cap: float) -> None:
    hidden, weight, _, labels = inputs()
    with pytest.raises(ValueError, match="softcap"):
        token_logps_from_hidden(hidden, weight, labels, chunk_tokens=4, softcap=cap)
    with pytest.raises(ValueError, match="softcap"):
        full_kl_from_hidden(HeadStates(hidden, weight), HeadStates(hidden, weight, softcap=cap), chunk_tokens=4)
