"""Log-probabilities out of hidden states in chunks: gradients, extremes, formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline_lib.losses.tokens import (
    HeadStates,
    compare_from_hidden,
    full_kl_from_hidden,
    masked_mean,
    mean_logps_from_hidden,
    smoothed_nll,
    token_logps_from_hidden,
)


def inputs(num: int = 6, width: int = 4, vocabulary: int = 9, *, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((num, width), (vocabulary, width), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(0, vocabulary, (num,), generator=generator)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 6, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradient_is_the_derivative(chunk_tokens: int, temperature: float, with_bias: bool) -> None:
    hidden, weight, bias, labels = inputs()

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps_from_hidden(
            hidden, weight, labels, head_bias_V=bias if with_bias else None,
            chunk_tokens=chunk_tokens, temperature=temperature,
        )[0]  # fmt: skip

    for values in (hidden, weight, bias):
        values.requires_grad_()
    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


@pytest.mark.parametrize("learned", [0, 1, 2])
def test_frozen_parts_get_no_gradient(learned: int) -> None:
    *values, labels = inputs()
    values[learned].requires_grad_()
    token_logp_N, _ = token_logps_from_hidden(values[0], values[1], labels, head_bias_V=values[2], chunk_tokens=2)
    token_logp_N.sum().backward()
    assert [part.grad is not None for part in values] == [place == learned for place in range(3)]


@pytest.mark.parametrize("scale", [1e2, 1e5, 1e8])
def test_extreme_logits_are_finite(scale: float) -> None:
    hidden, weight, bias, labels = (part.float() if part.is_floating_point() else part for part in inputs(scale=scale))
    hidden.requires_grad_()
    token_logp_N, entropy_N = token_logps_from_hidden(
        hidden, weight, labels, head_bias_V=bias, chunk_tokens=4, with_entropy=True
    )
    token_logp_N.sum().backward()
    assert entropy_N is not None
    for values in (token_logp_N, entropy_N, hidden.grad):
        assert values is not None
        assert torch.isfinite(values).all()
    assert (token_logp_N <= 0).all()


def test_bf16_is_near_float32() -> None:
    """The product is rounded to 8 bits: 2^-8 of logits of about 8; the softmax itself is float32."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(50, 32, generator=generator) * 0.5
    labels = torch.randint(0, 50, (64,), generator=generator)

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        parts = [values.to(torch.bfloat16).to(dtype).requires_grad_() for values in (hidden, weight)]
        token_logp_N, _ = token_logps_from_hidden(parts[0], parts[1], labels, chunk_tokens=16)
        token_logp_N.mean().backward()
        assert parts[0].grad is not None
        assert parts[1].grad is not None
        assert parts[0].grad.dtype == parts[1].grad.dtype == dtype
        return token_logp_N.detach(), parts[0].grad.float(), parts[1].grad.float()

    wide, narrow = run(torch.float32), run(torch.bfloat16)
    assert narrow[0].dtype == torch.float32
    torch.testing.assert_close(narrow[0], wide[0], rtol=0, atol=2**-4)
    for coarse, fine in zip(narrow[1:], wide[1:], strict=True):
        assert float((coarse - fine).norm() / fine.norm()) < 0.02


def test_a_head_in_another_format_than_its_input() -> None:
    hidden, weight, bias, labels = inputs()
    head = weight.float().requires_grad_()
    token_logp_N, _ = token_logps_from_hidden(hidden, head, labels, head_bias_V=bias, chunk_tokens=4)
    token_logp_N.sum().backward()
    assert token_logp_N.dtype == torch.float64
    assert head.grad is not None
    assert head.grad.dtype == torch.float32


def test_no_token_at_all() -> None:
    hidden, weight, _, labels = inputs(num=0)
    hidden.requires_grad_()
    token_logp_N, entropy_N = token_logps_from_hidden(hidden, weight, labels, chunk_tokens=4, with_entropy=True)
    token_logp_N.sum().backward()
    assert token_logp_N.shape == (0,)
    assert entropy_N is not None
    assert entropy_N.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)


def test_entropy_of_equal_logits_is_the_logarithm() -> None:
    hidden, weight, _, labels = inputs()
    _, entropy_N = token_logps_from_hidden(0 * hidden, weight, labels, chunk_tokens=4, with_entropy=True)
    assert entropy_N is not None
    assert entropy_N.tolist() == pytest.approx([2.1972245773362196] * 6, rel=1e-12)  # ln 9
    assert token_logps_from_hidden(hidden, weight, labels, chunk_tokens=4)[1] is None


def test_refusals() -> None:
    hidden, weight, bias, labels = inputs()
    with pytest.raises(ValueError, match=r"must be \(N, D\), \(V, D\) and \(N,\)"):
        token_logps_from_hidden(hidden, weight, labels[:-1], chunk_tokens=4)
    with pytest.raises(ValueError, match=r"must be \(N, D\), \(V, D\) and \(N,\)"):
        token_logps_from_hidden(hidden, weight.T, labels, chunk_tokens=4)
    with pytest.raises(ValueError, match=r"bias \(8,\) must be \(V,\)"):
        token_logps_from_hidden(hidden, weight, labels, head_bias_V=bias[:-1], chunk_tokens=4)
    with pytest.raises(ValueError, match=r"temperature 0\.0"):
        token_logps_from_hidden(hidden, weight, labels, chunk_tokens=4, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens 0"):
        token_logps_from_hidden(hidden, weight, labels, chunk_tokens=0)


def test_masked_mean_leaves_out_what_does_not_count() -> None:
    values = torch.tensor([[1.0, 2.0], [6.0, float("nan")]], dtype=torch.float64, requires_grad=True)
    mean = masked_mean(values, torch.tensor([[True, True], [True, False]]))
    mean.backward()
    assert float(mean.detach()) == 3.0
    assert values.grad is not None
    assert values.grad.tolist() == [[1 / 3, 1 / 3], [1 / 3, 0.0]]
    with pytest.raises(ValueError, match="the mask is empty"):
        masked_mean(values, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must have one shape"):
        masked_mean(values, torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_of_a_frozen_head_is_formed_in_the_forward_pass(chunk_tokens: int, temperature: float) -> None:
    hidden, weight, bias, labels = inputs()
    hidden.requires_grad_()

    def logps(hidden: Tensor) -> Tensor:
        return token_logps_from_hidden(
            hidden, weight, labels, head_bias_V=bias, chunk_tokens=chunk_tokens, temperature=temperature
        )[0]

    assert torch.autograd.gradcheck(logps, (hidden,))
    with torch.no_grad():
        silent = logps(hidden)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, logps(hidden).detach(), rtol=0, atol=0)


def test_chunks_share_buffers_but_no_results() -> None:
    """A last chunk that is shorter, and two calls after each other, leave earlier results as they were."""
    hidden, weight, bias, labels = inputs(num=7)
    whole = torch.log_softmax(hidden @ weight.T + bias, -1)
    first, entropy = token_logps_from_hidden(
        hidden, weight, labels, head_bias_V=bias, chunk_tokens=3, with_entropy=True
    )
    token_logps_from_hidden(hidden.flip(0), weight, labels, head_bias_V=bias, chunk_tokens=3)
    torch.testing.assert_close(first, whole.gather(1, labels[:, None])[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_nll_is_torchs(with_bias: bool, smoothing: float) -> None:
    hidden, weight, bias, labels = (part.requires_grad_() if part.is_floating_point() else part for part in inputs())
    given = bias if with_bias else None

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = bias if with_bias else None
        logps, _ = token_logps_from_hidden(hidden, weight, labels, head_bias_V=given, chunk_tokens=4, temperature=1.3)
        means = mean_logps_from_hidden(hidden, weight, labels, logps, head_bias_V=given, temperature=1.3)
        return smoothed_nll(logps, means, label_smoothing=smoothing)

    logits = (hidden @ weight.T + (0 if given is None else given)) / 1.3
    theirs = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours(hidden, weight, bias), theirs, rtol=1e-12, atol=1e-12)
    learned = (hidden, weight, bias) if with_bias else (hidden, weight)
    wanted = torch.autograd.grad((theirs * torch.arange(6)).sum(), learned)
    found = torch.autograd.grad((ours(hidden, weight, bias) * torch.arange(6)).sum(), learned)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_head_learned", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_full_kl_against_all_logits(is_head_learned: bool, chunk_tokens: int) -> None:
    hidden, weight, bias, _ = inputs()
    ref_hidden, ref_weight, _, _ = inputs(width=3, scale=0.7)  # another width, the same words
    hidden.requires_grad_()
    weight.requires_grad_(is_head_learned)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return full_kl_from_hidden(
            HeadStates(hidden, weight, bias), HeadStates(ref_hidden, ref_weight, bias / 2),
            chunk_tokens=chunk_tokens, temperature=0.8,
        )  # fmt: skip

    logp = torch.log_softmax((hidden @ weight.T + bias) / 0.8, -1)
    logq = torch.log_softmax((ref_hidden @ ref_weight.T + bias / 2) / 0.8, -1)
    torch.testing.assert_close(ours(hidden, weight), (logp.exp() * (logp - logq)).sum(-1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_policy_and_reference_are_compared_in_one_pass(chunk_tokens: int, softcap: float | None) -> None:
    hidden, weight, bias, labels = inputs()
    ref_hidden, ref_weight, _, _ = inputs(width=3, scale=0.7)
    found = compare_from_hidden(
        HeadStates(hidden, weight, bias), HeadStates(ref_hidden, ref_weight, None, softcap), labels,
        chunk_tokens=chunk_tokens, temperature=0.8,
    )  # fmt: skip
    logp = torch.log_softmax((hidden @ weight.T + bias) / 0.8, -1)
    ref_logits = ref_hidden @ ref_weight.T
    if softcap is not None:
        ref_logits = softcap * torch.tanh(ref_logits / softcap)
    logq = torch.log_softmax(ref_logits / 0.8, -1)
    of_label = (torch.arange(6), labels)
    wanted = (logp[of_label], -(logp.exp() * logp).sum(-1), logq[of_label], (logp.exp() * (logp - logq)).sum(-1))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_policy_that_is_its_reference_differs_by_nothing() -> None:
    hidden, weight, _, labels = (part.float() if part.is_floating_point() else part for part in inputs(scale=50.0))
    found = compare_from_hidden(HeadStates(hidden, weight), HeadStates(hidden, weight), labels, chunk_tokens=4)
    assert found.full_kl_N.tolist() == [0.0] * 6
    assert torch.equal(found.logp_N, found.ref_logp_N)
    alone_N, entropy_N = token_logps_from_hidden(hidden, weight, labels, chunk_tokens=4, with_entropy=True)
    assert entropy_N is not None
    torch.testing.assert_close(found.logp_N, alone_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy_N, entropy_N, rtol=1e-6, atol=1e-6)


def test_nothing_to_compare_is_no_figure() -> None:
    hidden, weight, bias, labels = inputs()
    none = HeadStates(hidden[:0], weight, bias)
    assert [len(values) for values in compare_from_hidden(none, none, labels[:0], chunk_tokens=4)] == [0] * 4


def test_full_kl_of_a_model_with_itself_is_zero() -> None:
    hidden, weight, _, _ = (part.float() if part.is_floating_point() else part for part in inputs(scale=50.0))
    hidden.requires_grad_()
    kl = full_kl_from_hidden(HeadStates(hidden, weight), HeadStates(hidden.detach(), weight), chunk_tokens=4)
    kl.sum().backward()
    assert kl.tolist() == [0.0] * 6
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) == 0.0


def test_refusals_of_divergence_and_smoothing() -> None:
    hidden, weight, _, labels = inputs()
    states = HeadStates(hidden, weight)
    with pytest.raises(ValueError, match="as many tokens and words: 6 and 5 tokens"):
        full_kl_from_hidden(states, HeadStates(hidden[:5], weight), chunk_tokens=4)
    with pytest.raises(ValueError, match="9 and 8 words"):
        full_kl_from_hidden(states, HeadStates(hidden, weight[:8]), chunk_tokens=4)
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(V, D\)"):
        full_kl_from_hidden(states, HeadStates(hidden[:, :2], weight), chunk_tokens=4)
    with pytest.raises(ValueError, match="as many tokens and words: 6 and 6 tokens, 9 and 8 words"):
        compare_from_hidden(states, HeadStates(hidden, weight[:8]), labels, chunk_tokens=4)
    with pytest.raises(ValueError, match=r"must be \(N, D\), \(V, D\) and \(N,\)"):
        mean_logps_from_hidden(hidden, weight, labels, hidden[:3, 0])
    with pytest.raises(ValueError, match="be 0 to 1"):
        smoothed_nll(hidden[:, 0], hidden[:, 0], label_smoothing=1.5)
