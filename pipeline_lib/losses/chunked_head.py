"""The language-model head on chunks of tokens: a value a token, and its gradient, without all logits in memory.

Where the head itself is not trained, the gradient of each token's value with respect to its hidden
state (N x D) is formed in the forward pass, while the chunk's logits are there: backward is then a
row scaling, and the logits are computed once. Where the head is trained, backward computes them again.

Legend: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkValues(NamedTuple):
    """What a measure says of a chunk."""

    value_C: Tensor
    detail_C: Tensor | None
    """A second figure, without gradient."""
    grad_CV: Tensor | None
    """d value / d logits, in a buffer that the next chunk overwrites."""


class LogitsFrom(NamedTuple):
    """How the head's products become logits: softcap tanh((hidden @ head^T + bias) / softcap) / temperature."""

    chunk_tokens: int
    temperature: float = 1.0
    softcap: float | None = None
    """Logits stay within -+ this; None: as they come (Gemma 2 caps them at 30)."""


class Measure(Protocol):
    """A figure of each token's distribution."""

    def __call__(self, head: ChunkedHead, hidden_CD: Tensor, part: slice, *, with_gradient: bool) -> ChunkValues:
        """Measure the tokens `part`, whose hidden states are given."""


class ChunkedHead:
    """A head with buffers for one chunk, used again for the next: to allocate them anew costs more than a softmax."""

    def __init__(self, like_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, how: LogitsFrom) -> None:
        """Take the head, hidden states whose format and device count, and what makes logits of the products."""
        narrow = _product_format(like_ND)
        wide = torch.promote_types(narrow, torch.float32)
        shape = (min(how.chunk_tokens, like_ND.shape[0]), weight_VD.shape[0])
        self.weight_VD, self.bias_V = weight_VD.to(narrow), bias_V
        self.chunk_tokens, self.temperature, self.softcap = how
        self._product_CV = like_ND.new_empty(shape, dtype=narrow)
        self._logits_CV = self._product_CV if narrow == wide else like_ND.new_empty(shape, dtype=wide)
        self._prob_CV = like_ND.new_empty(shape, dtype=wide)
        self._slope_CV = None if self.softcap is None else like_ND.new_empty(shape, dtype=wide)

    def parts(self, num_tokens: int) -> Iterator[slice]:
        """Cut N tokens into chunks."""
        for start in range(0, num_tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_tokens))

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the capped logits / temperature in float32 or wider; the next call overwrites them."""
        rows = hidden_CD.shape[0]
        torch.mm(hidden_CD.to(self.weight_VD.dtype), self.weight_VD.T, out=self._product_CV[:rows])
        logits_CV = self._logits_CV[:rows]
        if self._logits_CV is not self._product_CV:
            logits_CV.copy_(self._product_CV[:rows])
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.softcap is not None and self._slope_CV is not None:
            logits_CV.div_(self.softcap).tanh_()
            # Kept for the gradient: d cap tanh(z / cap) / dz = 1 - tanh^2(z / cap).
            torch.mul(logits_CV, logits_CV, out=self._slope_CV[:rows]).neg_().add_(1.0)
            logits_CV *= self.softcap
        if self.temperature != 1.0:
            logits_CV /= self.temperature
        return logits_CV

    def softmax(self, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(probabilities_CV, log_normalizer_C)`; the next call overwrites the probabilities."""
        prob_CV = torch.softmax(logits_CV, -1, out=self._prob_CV[: logits_CV.shape[0]])
        # The largest probability is 1 / sum exp(z - max z): two maxima are cheaper than a second exponential.
        return prob_CV, logits_CV.amax(-1) - prob_CV.amax(-1).log()

    def below_cap(self, grad_CV: Tensor) -> Tensor:
        """Take a gradient in the last logits back through their cap, in place."""
        return grad_CV if self._slope_CV is None else grad_CV.mul_(self._slope_CV[: grad_CV.shape[0]])

    def narrow(self, grad_CV: Tensor) -> Tensor:
        """Return a gradient in the format of the products, in the buffer of the logits."""
        if grad_CV.dtype == self._product_CV.dtype:
            return grad_CV
        return self._product_CV[: grad_CV.shape[0]].copy_(grad_CV)


def per_token(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, measure: Measure, how: LogitsFrom
) -> tuple[Tensor, Tensor | None]:
    """Measure each token's distribution, the softmax of its logits, with gradient.

    Returns:
        `(value_N, detail_N)` in float32 or wider; only the value carries a gradient.
    """
    learned = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (hidden_ND, weight_VD, bias_V)
    )
    if not learned:
        with torch.no_grad():
            return _values(ChunkedHead(hidden_ND, weight_VD, bias_V, how), hidden_ND, measure)
    value_N, detail_N = _PerToken.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, measure, how
    )
    return value_N, detail_N


def _product_format(hidden_ND: Tensor) -> torch.dtype:
    """Return the format of the products: float32 where a processor would only emulate bf16, many times slower."""
    emulated = hidden_ND.device.type == "cpu" and hidden_ND.dtype == torch.bfloat16
    if emulated and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return hidden_ND.dtype


def _values(
    head: ChunkedHead, hidden_ND: Tensor, measure: Measure, grad_ND: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Measure chunk by chunk, and where asked fill `grad_ND` with d value / d hidden."""
    values, details = [hidden_ND.new_empty(0, dtype=head._prob_CV.dtype)], []
    for part in head.parts(hidden_ND.shape[0]):
        found = measure(head, hidden_ND[part], part, with_gradient=grad_ND is not None)
        values.append(found.value_C)
        if found.detail_C is not None:
            details.append(found.detail_C)
        if grad_ND is not None:
            assert found.grad_CV is not None
            narrow_CV = head.narrow(head.below_cap(found.grad_CV))
            grad_ND[part] = (narrow_CV @ head.weight_VD) / head.temperature
    if not details and hidden_ND.shape[0]:
        return torch.cat(values), None
    return torch.cat(values), torch.cat([values[0], *details])


class _PerToken(torch.autograd.Function):
    """A measure of each token, with the gradient formed in whichever pass is cheaper."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, measure: Measure, how: LogitsFrom
    ) -> tuple[Tensor, Tensor | None]:
        """Return value and detail of each token."""
        head = ChunkedHead(hidden_ND, weight_VD, bias_V, how)
        ctx.is_head_learned = any(ctx.needs_input_grad[1:3])
        if ctx.is_head_learned:
            value_N, detail_N = _values(head, hidden_ND, measure)
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
            ctx.measure, ctx.how = measure, how
        else:
            grad_ND = torch.empty_like(hidden_ND)
            value_N, detail_N = _values(head, hidden_ND, measure, grad_ND)
            ctx.save_for_backward(grad_ND)
        if detail_N is not None:
            ctx.mark_non_differentiable(detail_N)
        return value_N, detail_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Push the gradient of the values through the head."""
        if not ctx.is_head_learned:
            (grad_ND,) = ctx.saved_tensors
            return (grad_ND * grad_N.to(grad_ND.dtype)[:, None], *[None] * 4)
        return (*_through_learned_head(ctx, grad_N), None, None)


def _through_learned_head(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden states, head and bias, from logits computed again."""
    hidden_ND, weight_VD, bias_V = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    head = ChunkedHead(hidden_ND, weight_VD, bias_V, ctx.how)
    grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
    grad_weight = torch.zeros_like(head.weight_VD) if needs_weight else None
    grad_bias = torch.zeros_like(bias_V) if needs_bias else None
    for part in head.parts(hidden_ND.shape[0]):
        grad_CV = head.below_cap(ctx.measure(head, hidden_ND[part], part, with_gradient=True).grad_CV)
        grad_CV *= grad_N[part, None]
        if grad_bias is not None:
            grad_bias += (grad_CV.sum(0) / head.temperature).to(grad_bias.dtype)
        narrow_CV = head.narrow(grad_CV)
        if grad_hidden is not None:
            grad_hidden[part] = (narrow_CV @ head.weight_VD) / head.temperature
        if grad_weight is not None:
            grad_weight.addmm_(narrow_CV.T, hidden_ND[part].to(narrow_CV.dtype), alpha=1 / head.temperature)
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), grad_bias
