"""Attention of single tokens to a prompt that several rows share, and to what each row has of its own.

Legend: B rows, G prompts, K rows of a prompt, H key heads, Q query heads of a key head, T columns of a
prompt, R columns of a row's own, W width of a head.

softmax over both stretches is a mean of the softmax over each, with their sums of exponentials as weights:
`a = exp(lse_prompt) / (exp(lse_prompt) + exp(lse_own))`, `output = a output_prompt + (1 - a) output_own`.
So the rows of a prompt ask its keys and values together, in one product, which reads them once.

Source: Juravsky et al. 2024 (arXiv 2402.05099, Hydragen), section 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from pipeline_lib.generation.slots import LayerStates
from pipeline_lib.models.attention import refuse_unknown

SHARED_ATTENTION = "shared_prompts"
"""The name of this attention among those of transformers."""


@dataclass(frozen=True)
class SharedStep:
    """What every layer needs to know of a step."""

    prompts: Sequence[LayerStates]
    """Keys and values of the prompts in use, `(G, H, T, W)`, layer by layer."""
    hidden_G11T: Tensor | None
    """Added to the scores: minus infinity behind a prompt's end; None: all are equally long."""
    hidden_B11R: Tensor | None
    """The same of the rows' own columns."""
    row_GK: Tensor
    """The rows of each prompt; filled up with any row."""
    place_B: Tensor
    """Where each row is in `row_GK`, laid flat."""


@contextmanager
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend with `attention_to_both` for a while.

    Raises:
        ValueError: The model's attention cannot be replaced.
    """
    if not model._can_set_attn_implementation():
        raise ValueError("its attention cannot be replaced")
    AttentionInterface.register(SHARED_ATTENTION, attention_to_both)
    AttentionMaskInterface.register(SHARED_ATTENTION, sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = SHARED_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attention_to_both(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the step says what is hidden
    *,
    shared_prompts: SharedStep,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to each row's prompt and to its own columns.

    Args:
        module: The attention layer, which knows its number.
        query: `(B, H * Q, 1, W)`.
        key: The rows' own, `(B, H, R, W)`.
        value: As `key`.
        attention_mask: Not used.
        shared_prompts: The prompts, and whose they are.
        scaling: Of the scores; None: 1 / sqrt(W).
        softcap: Scores are capped by `softcap * tanh(score / softcap)`, as in Gemma 2.
        **kwargs: What else the layer says.

    Returns:
        `(output, None)`, output `(B, 1, H * Q, W)`.

    Raises:
        NotImplementedError: The layer wants a bias or sinks.
    """
    refuse_unknown(kwargs, attention="attention to shared prompts")
    step = shared_prompts
    prompt_key, prompt_value = step.prompts[int(module.layer_idx)]  # type: ignore[arg-type]  # a number, not a module
    (num_prompts, copies), heads = step.row_GK.shape, key.shape[1]
    query_BHQW = query.reshape(query.shape[0], heads, -1, query.shape[-1])
    query_BHQW = query_BHQW * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    # All rows of a prompt as the queries of one row.
    asked = query_BHQW[step.row_GK].transpose(1, 2).reshape(num_prompts, heads, -1, query.shape[-1])
    own, own_sum = _attend(query_BHQW, key, value, step.hidden_B11R, softcap)
    prompt, prompt_sum = (
        found.view(num_prompts, heads, copies, -1, found.shape[-1]).transpose(1, 2).flatten(0, 1)[step.place_B]
        for found in _attend(asked, prompt_key, prompt_value, step.hidden_G11T, softcap)
    )
    output = own.lerp(prompt, torch.sigmoid(prompt_sum - own_sum).to(own.dtype))
    return output.reshape(query.shape[0], 1, query.shape[1], -1), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the mean of the values, and the logarithm of the sum of exponentials, float32 or wider."""
    score = query @ key.transpose(-1, -2)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if hidden is not None:
        score = score + hidden
    weight = score.softmax(-1)
    # The largest weight is exp(largest score - log sum): two maxima are cheaper than a second exponential.
    log_sum = score.amax(-1, keepdim=True) - weight.amax(-1, keepdim=True).log()
    return weight.to(value.dtype) @ value, log_sum
