"""Log-probabilities of tokens out of hidden states, without the full logits in memory.

Legend: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logps_from_hidden(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    labels_N: Tensor,
    *,
    head_bias_V: Tensor | None = None,
    chunk_tokens: int,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute log softmax(hidden @ head^T / temperature)[label] for each token, in chunks.

    Only C x V logits are in memory at once, in the forward and in the backward pass, which computes
    them again. The softmax is taken in float32, in float64 where the hidden states are float64.

    Args:
        hidden_ND: Last hidden states of the positions that predict the labels.
        head_weight_VD: The language-model head.
        labels_N: Token ids, 0 to V - 1.
        head_bias_V: The head's bias, where it has one.
        chunk_tokens: C.
        temperature: Divides the logits, as when sampling (N-details 10).
        with_entropy: Also return the entropy of each distribution, in nats, without gradient.

    Returns:
        `(token_logp_N, entropy_N)`, float32 or float64; `entropy_N` is None unless asked for.

    Raises:
        ValueError: The shapes do not fit, or the temperature or the chunk is not above 0.
    """
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != head_weight_VD.shape[1] or labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, head {tuple(head_weight_VD.shape)} and labels "
            f"{tuple(labels_N.shape)} must be (N, D), (V, D) and (N,)"
        )
    if head_bias_V is not None and head_bias_V.shape != head_weight_VD.shape[:1]:
        raise ValueError(f"bias {tuple(head_bias_V.shape)} must be (V,), V = {head_weight_VD.shape[0]}")
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(f"temperature {temperature} and chunk_tokens {chunk_tokens} must be above 0")
    entropy_N = None
    if with_entropy:
        entropy_N = _entropy(hidden_ND, head_weight_VD, head_bias_V, chunk_tokens, temperature)
    token_logp_N: Tensor = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_weight_VD, head_bias_V, labels_N, chunk_tokens, temperature
    )
    return token_logp_N, entropy_N


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    logits_CV = hidden_CD @ weight_VD.to(hidden_CD.dtype).T
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if bias_V is not None:
        wide_CV = wide_CV + bias_V
    return wide_CV if temperature == 1.0 else wide_CV / temperature


@torch.no_grad()
def _entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk_tokens: int, temperature: float
) -> Tensor:
    chunks = []
    for hidden_CD in hidden_ND.split(chunk_tokens):
        logp_CV = torch.log_softmax(_logits(hidden_CD, weight_VD, bias_V, temperature), dim=-1)
        chunks.append(-(logp_CV.exp() * logp_CV).sum(-1))
    return torch.cat(chunks)


class _ChunkedLogps(torch.autograd.Function):
    """Gathered log-softmax whose backward computes each chunk's logits anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        chunk_tokens: int,
        temperature: float,
    ) -> Tensor:
        """Return the log-probability of each label."""
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        ctx.chunk_tokens, ctx.temperature = chunk_tokens, temperature
        chunks = []
        for hidden_CD, labels_C in zip(hidden_ND.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True):
            logits_CV = _logits(hidden_CD, weight_VD, bias_V, temperature)
            chosen_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
            chunks.append(chosen_C - logits_CV.logsumexp(-1))
        return torch.cat(chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Return d logp / d logits = one_hot(label) - softmax, pushed through the head."""
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V) if needs_bias else None
        for start in range(0, hidden_ND.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            hidden_CD = hidden_ND[part]
            grad_CV = torch.softmax(_logits(hidden_CD, weight_VD, bias_V, ctx.temperature), dim=-1).neg_()
            grad_CV[torch.arange(grad_CV.shape[0]), labels_N[part]] += 1.0
            grad_CV *= (grad_N[part] / ctx.temperature)[:, None]
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0).to(grad_bias.dtype)
            grad_CV = grad_CV.to(hidden_CD.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_CV @ weight_VD.to(hidden_CD.dtype)
            if grad_weight is not None:
                grad_weight += (grad_CV.T @ hidden_CD).to(grad_weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values where the mask is True.

    Raises:
        ValueError: The shapes differ, or nothing counts.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have one shape")
    count = mask.sum()
    if int(count) == 0:
        raise ValueError("the mask is empty: there is nothing to take a mean of")
    return torch.where(mask, values, torch.zeros_like(values)).sum() / count
