"""Log-probabilities and divergences of tokens out of hidden states, without the full logits in memory.

Legend: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline_lib.losses.chunked_head import ChunkedHead, ChunkValues, LogitsFrom, per_token


def token_logps_from_hidden(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    labels_N: Tensor,
    *,
    head_bias_V: Tensor | None = None,
    chunk_tokens: int,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute log softmax(logits / temperature)[label] for each token, in chunks.

    logits = hidden @ head^T + bias; with a cap, softcap tanh((hidden @ head^T + bias) / softcap).

    Only C x V logits are in memory at once, in the forward and in the backward pass. The softmax is
    taken in float32, in float64 where the hidden states are float64.

    Args:
        hidden_ND: Last hidden states of the positions that predict the labels.
        head_weight_VD: The language-model head.
        labels_N: Token ids, 0 to V - 1.
        head_bias_V: The head's bias, where it has one.
        chunk_tokens: C.
        temperature: Divides the logits, as when sampling (N-details 10).
        softcap: Bounds the logits smoothly, before the temperature (Gemma 2: 30); None: no bound.
        with_entropy: Also return the entropy of each distribution, in nats, without gradient.

    Returns:
        `(token_logp_N, entropy_N)`, float32 or float64; `entropy_N` is None unless asked for.

    Raises:
        ValueError: The shapes do not fit, or the temperature, the cap or the chunk is not above 0.
    """
    how = LogitsFrom(chunk_tokens, temperature, softcap)
    _check(hidden_ND, head_weight_VD, head_bias_V, how, labels_N=labels_N)
    token_logp_N, entropy_N = per_token(hidden_ND, head_weight_VD, head_bias_V, _LabelLogp(labels_N, with_entropy), how)
    return token_logp_N, entropy_N if with_entropy else None


def mean_logps_from_hidden(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    labels_N: Tensor,
    token_logp_N: Tensor,
    *,
    head_bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 256,
) -> Tensor:
    """Return the mean over the vocabulary of each token's log-probabilities, with gradient.

    mean_v log p_v = mean_v z_v - (z_label - log p_label): the mean of the logits is the hidden
    state times the mean row of the head, so no logits are formed beyond those of the labels.
    Capped logits have no such mean: there they are formed again, in chunks.

    Args:
        hidden_ND: As given to `token_logps_from_hidden`.
        head_weight_VD: As given there.
        labels_N: As given there.
        token_logp_N: What it returned.
        head_bias_V: As given there.
        temperature: As given there.
        softcap: As given there.
        chunk_tokens: Tokens of a chunk, where logits are formed.

    Returns:
        `(N,)`, in the format of `token_logp_N`.

    Raises:
        ValueError: The shapes do not fit.
    """
    how = LogitsFrom(chunk_tokens, temperature, softcap)
    _check(hidden_ND, head_weight_VD, head_bias_V, how, labels_N=labels_N, token_logp_N=token_logp_N)
    if softcap is not None:
        return per_token(hidden_ND, head_weight_VD, head_bias_V, _mean_logp, how)[0]
    wide_ND = hidden_ND.to(token_logp_N.dtype)
    # One product with the difference of the rows: the two logits apart would lose digits to each other.
    apart_ND = head_weight_VD.mean(0, dtype=wide_ND.dtype) - head_weight_VD[labels_N].to(wide_ND.dtype)
    apart_N = (wide_ND * apart_ND).sum(-1)
    if head_bias_V is not None:
        wide_V = head_bias_V.to(wide_ND.dtype)
        apart_N = apart_N + wide_V.mean() - wide_V[labels_N]
    return apart_N / temperature + token_logp_N


def smoothed_nll(token_logp_N: Tensor, mean_logp_N: Tensor, *, label_smoothing: float) -> Tensor:
    """Return -(1 - e) log p_label - e mean_v log p_v for each token, torch's label smoothing.

    Args:
        token_logp_N: Log-probability of each label.
        mean_logp_N: Mean log-probability over the vocabulary.
        label_smoothing: e, the share of the target that is spread over the vocabulary, 0 to 1.

    Raises:
        ValueError: The shapes differ, or e is outside 0 to 1.

    Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7.
    """
    if token_logp_N.shape != mean_logp_N.shape or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"log-probabilities {tuple(token_logp_N.shape)} and means {tuple(mean_logp_N.shape)} must have one shape, "
            f"and label_smoothing {label_smoothing} be 0 to 1"
        )
    return -(1 - label_smoothing) * token_logp_N - label_smoothing * mean_logp_N


@dataclass(frozen=True)
class HeadStates:
    """A model's last hidden states at the positions that predict tokens, and what makes logits of them."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    """The model's cap on its logits, where it has one."""


def full_kl_from_hidden(
    policy: HeadStates, reference: HeadStates, *, chunk_tokens: int, temperature: float = 1.0
) -> Tensor:
    """Compute KL(policy || reference) = sum_v p_v (log p_v - log q_v) at each token, in chunks.

    The gradient goes to the policy's hidden states and head alone. Widths may differ, vocabularies not.

    Args:
        policy: States of the positions that predict tokens.
        reference: Those of the same positions.
        chunk_tokens: C.
        temperature: Divides both models' logits.

    Returns:
        `(N,)`, nats, float32 or float64.

    Raises:
        ValueError: The shapes do not fit, or the temperature, a cap or the chunk is not above 0.
    """
    how, ref_how = _checked_alike(policy, reference, chunk_tokens, temperature)
    with torch.no_grad():
        ref_head = ChunkedHead(reference.hidden_ND, reference.weight_VD, reference.bias_V, ref_how)
    of_chunk = _FullKl(ref_head, reference.hidden_ND.detach())
    return per_token(policy.hidden_ND, policy.weight_VD, policy.bias_V, of_chunk, how)[0]


class Compared(NamedTuple):
    """What two models say of tokens, `(N,)` each, nats, float32 or float64, without gradient."""

    logp_N: Tensor
    """Log-probability of each label under the policy."""
    entropy_N: Tensor
    """Of the policy's distribution."""
    ref_logp_N: Tensor
    full_kl_N: Tensor
    """KL(policy || reference) = sum_v p_v (log p_v - log q_v)."""


@torch.no_grad()
def compare_from_hidden(
    policy: HeadStates, reference: HeadStates, labels_N: Tensor, *, chunk_tokens: int, temperature: float = 1.0
) -> Compared:
    """Measure sampled tokens under policy and reference, the logits of each computed once, in chunks.

    The numbers are those of `token_logps_from_hidden` and `full_kl_from_hidden`.

    Args:
        policy: Whose samples the labels are.
        reference: What the KL is measured from; its vocabulary is the policy's.
        labels_N: Token ids, 0 to V - 1.
        chunk_tokens: C.
        temperature: Divides both models' logits.

    Raises:
        ValueError: The shapes do not fit, or the temperature, a cap or the chunk is not above 0.
    """
    how, ref_how = _checked_alike(policy, reference, chunk_tokens, temperature, labels_N=labels_N)
    head = ChunkedHead(policy.hidden_ND, policy.weight_VD, policy.bias_V, how)
    ref_head = ChunkedHead(reference.hidden_ND, reference.weight_VD, reference.bias_V, ref_how)
    rows = [policy.hidden_ND.new_empty((0, 4), dtype=torch.promote_types(policy.hidden_ND.dtype, torch.float32))]
    for part in head.parts(policy.hidden_ND.shape[0]):
        logits_CV, ref_logits_CV = head.logits(policy.hidden_ND[part]), ref_head.logits(reference.hidden_ND[part])
        prob_CV, normalizer_C = head.softmax(logits_CV)
        _, ref_normalizer_C = ref_head.softmax(ref_logits_CV)
        logp_CV, ref_logp_CV = logits_CV.sub_(normalizer_C[:, None]), ref_logits_CV.sub_(ref_normalizer_C[:, None])
        of_label = [each.gather(1, labels_N[part, None]).squeeze(1) for each in (logp_CV, ref_logp_CV)]
        entropy_C = -torch.linalg.vecdot(prob_CV, logp_CV)
        full_kl_C = torch.linalg.vecdot(prob_CV, ref_logp_CV.sub_(logp_CV).neg_())
        rows.append(torch.stack([of_label[0], entropy_C, of_label[1], full_kl_C], 1))
    return Compared(*torch.cat(rows).unbind(1))


@dataclass(frozen=True)
class _LabelLogp:
    """log p of the label; its gradient in the logits is one_hot(label) - p."""

    labels_N: Tensor
    with_entropy: bool

    def __call__(self, head: ChunkedHead, hidden_CD: Tensor, part: slice, *, with_gradient: bool) -> ChunkValues:
        logits_CV, labels_C1 = head.logits(hidden_CD), self.labels_N[part, None]
        prob_CV, normalizer_C = head.softmax(logits_CV)
        logp_C = logits_CV.gather(1, labels_C1).squeeze(1) - normalizer_C
        entropy_C = None
        if self.with_entropy:
            logp_CV = logits_CV.sub_(normalizer_C[:, None])
            entropy_C = -torch.linalg.vecdot(prob_CV, logp_CV)
        if not with_gradient:
            return ChunkValues(logp_C, entropy_C, None)
        grad_CV = prob_CV.neg_()
        return ChunkValues(logp_C, entropy_C, grad_CV.scatter_add_(1, labels_C1, torch.ones_like(logp_C)[:, None]))


def _mean_logp(head: ChunkedHead, hidden_CD: Tensor, part: slice, *, with_gradient: bool) -> ChunkValues:  # noqa: ARG001
    """Measure the mean over the vocabulary of log p; its gradient in the logits is 1 / V - p."""
    logits_CV = head.logits(hidden_CD)
    prob_CV, normalizer_C = head.softmax(logits_CV)
    mean_C = logits_CV.mean(-1) - normalizer_C
    return ChunkValues(mean_C, None, prob_CV.neg_().add_(1 / prob_CV.shape[1]) if with_gradient else None)


@dataclass(frozen=True)
class _FullKl:
    """sum_v p_v d_v with d = log p - log q; its gradient in the logits is p (d - KL)."""

    reference: ChunkedHead
    ref_hidden_ND: Tensor

    def __call__(self, head: ChunkedHead, hidden_CD: Tensor, part: slice, *, with_gradient: bool) -> ChunkValues:
        logits_CV = head.logits(hidden_CD)
        prob_CV, normalizer_C = head.softmax(logits_CV)
        ref_logits_CV = self.reference.logits(self.ref_hidden_ND[part])
        _, ref_normalizer_C = self.reference.softmax(ref_logits_CV)
        apart_CV = logits_CV.sub_(ref_logits_CV).add_((ref_normalizer_C - normalizer_C)[:, None])
        kl_C = torch.linalg.vecdot(prob_CV, apart_CV)
        grad_CV = prob_CV.mul_(apart_CV.sub_(kl_C[:, None])) if with_gradient else None
        return ChunkValues(kl_C, None, grad_CV)


def _check(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, how: LogitsFrom, **per_token_N: Tensor) -> None:
    for values_N in per_token_N.values():
        if hidden_ND.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1] or values_N.shape != hidden_ND.shape[:1]:
            raise ValueError(
                f"hidden {tuple(hidden_ND.shape)}, head {tuple(weight_VD.shape)} and labels "
                f"{tuple(values_N.shape)} must be (N, D), (V, D) and (N,)"
            )
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and head {tuple(weight_VD.shape)} must be (N, D) and (V, D)")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias {tuple(bias_V.shape)} must be (V,), V = {weight_VD.shape[0]}")
    if not how.temperature > 0 or how.chunk_tokens < 1 or not (how.softcap is None or how.softcap > 0):
        capped = "" if how.softcap is None else f", softcap {how.softcap}"
        raise ValueError(f"temperature {how.temperature}{capped} and chunk_tokens {how.chunk_tokens} must be above 0")


def _checked_alike(
    policy: HeadStates, reference: HeadStates, chunk_tokens: int, temperature: float, **per_token_N: Tensor
) -> tuple[LogitsFrom, LogitsFrom]:
    """Return how the logits of two models are made, once their shapes are known to fit together."""
    how, ref_how = (LogitsFrom(chunk_tokens, temperature, model.softcap) for model in (policy, reference))
    for model, its_how in ((policy, how), (reference, ref_how)):
        _check(model.hidden_ND, model.weight_VD, model.bias_V, its_how, **per_token_N)
    tokens, ref_tokens = (model.hidden_ND.shape[0] for model in (policy, reference))
    words, ref_words = (model.weight_VD.shape[0] for model in (policy, reference))
    if tokens != ref_tokens or words != ref_words:
        raise ValueError(
            f"policy and reference must have as many tokens and words: {tokens} and {ref_tokens} tokens, "
            f"{words} and {ref_words} words"
        )
    return how, ref_how


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
