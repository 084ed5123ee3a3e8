"""Batched sampling from a causal language model, ended at the end-of-turn token.

Legend: B rows, T columns.
Prompts are sorted by length and padded on the left, so a batch wastes little; what they all begin
with is computed once. Every row's randomness is a function of (seed, row), not of the batch it
happens to be in, so the samples do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.fused_lora import summed_weights
from pipeline_lib.validation import Frozen


class SamplingSettings(Frozen):
    """How responses are drawn."""

    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a response, at most, its end-of-turn token included."""
    temperature: float = Field(1.0, ge=0)
    """Logits are divided by it; 0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the smallest set of tokens with at least this probability; 1 is the whole vocabulary."""
    min_new_tokens: int = Field(0, ge=0)
    """The end-of-turn token cannot be drawn before this many tokens."""
    stops_at_eos: bool = True
    """False: every response has `max_new_tokens`, and the end-of-turn token is one like any other."""
    batch_size: int = Field(32, ge=1)
    """Prompts generated for at once."""


@dataclass(frozen=True)
class Sample:
    """One sampled response."""

    ids: tuple[int, ...]
    """Token ids, ending with the end-of-turn token where the response is finished."""
    is_finished: bool
    """True where the model ended its turn itself."""
    logps: tuple[float, ...] | None = None
    """Log-probability of each token as another program's sampler says, nats; compared, never trained on."""


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    eos_id: int,
    pad_id: int,
    seed: int,
    samples_per_prompt: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Sample responses, one a prompt or several, which then share the prompt's keys and values.

    Args:
        model: In evaluation mode; the adapter in it, if any, as it is switched.
        prompts: Token ids, unpadded.
        settings: Temperature, limits and batch size.
        eos_id: Token that ends a turn.
        pad_id: Token that fills the left; masked.
        seed: The samples are a function of (seed, index of the sample, prompt, model).
        samples_per_prompt: Samples of each prompt; `batch_size` counts samples.
        on_batch: Called with the number of prompts done after each batch.

    Returns:
        The samples of the first prompt, then those of the next, in the order given.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    prompts_per_batch = max(1, settings.batch_size // samples_per_prompt)
    results: dict[int, Sample] = {}
    with summed_weights(model):
        for start in range(0, len(order), prompts_per_batch):
            members = order[start : start + prompts_per_batch]
            places = [index * samples_per_prompt + k for index in members for k in range(samples_per_prompt)]
            ids_BT = _generate(
                model, [list(prompts[index]) for index in members], settings,
                eos_id=eos_id, pad_id=pad_id, seeds=[derive_seed(seed, "sample", place) for place in places],
            )  # fmt: skip
            for place, row in zip(places, ids_BT, strict=True):
                end = row.index(eos_id) + 1 if settings.stops_at_eos and eos_id in row else len(row)
                results[place] = Sample(tuple(row[:end]), eos_id in row)
            if on_batch is not None:
                on_batch(len(results) // samples_per_prompt)
    return [results[place] for place in range(len(prompts) * samples_per_prompt)]


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    settings: SamplingSettings,
    *,
    eos_id: int,
    pad_id: int,
    seeds: list[int],
) -> list[list[int]]:
    """Sample a batch; rows that have ended leave it, so the last long response costs one row.

    There are as many seeds as samples: a prompt is computed once, and its state repeated for each of its samples.
    """
    device = model.device
    shared = common_prefix(prompts)
    own = [prompt[shared:] for prompt in prompts]
    width = max(len(prompt) for prompt in own)
    cache = DynamicCache(config=model.config)
    if shared:
        # What all prompts begin with is computed once, and its keys and values are repeated.
        model.base_model(input_ids=torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache)
        cache.batch_repeat_interleave(len(prompts))
    input_BT = torch.tensor([[pad_id] * (width - len(p)) + p for p in own], device=device)
    mask_BT = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in own], device=device)
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    position_B = mask_BT.sum(-1)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, shared:]
    copies = len(seeds) // len(prompts)
    generated: list[list[int]] = [[] for _ in seeds]
    active = list(range(len(seeds)))
    for step in range(settings.max_new_tokens):
        output = model(
            input_ids=input_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits_BV = output.logits[:, -1].float().cpu()
        if step < settings.min_new_tokens:
            logits_BV[:, eos_id] = -torch.inf
        if step == 0 and copies > 1:
            cache.batch_repeat_interleave(copies)
            logits_BV, mask_BT, position_B = _repeated((logits_BV, mask_BT, position_B), copies)
        token_B = draw_tokens(logits_BV, settings, [noise[row] for row in active])
        for row, token in zip(active, token_B, strict=True):
            generated[row].append(token)
        going = [place for place, token in enumerate(token_B) if token != eos_id or not settings.stops_at_eos]
        if not going:
            break
        if len(going) < len(active):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            mask_BT, position_B = mask_BT[keep], position_B[keep]
            active = [active[place] for place in going]
        input_BT = torch.tensor([[token_B[place]] for place in going], device=device)
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(going), 1)], dim=-1)
        positions_BT = position_B[:, None]
        position_B = position_B + 1
    return generated


def _repeated(tensors: Sequence[Tensor], copies: int) -> list[Tensor]:
    """Repeat every row, the copies of a row side by side."""
    return [tensor.repeat_interleave(copies, dim=0) for tensor in tensors]


def common_prefix(prompts: list[list[int]]) -> int:
    """Count the first tokens that all prompts share; at least one token of each is left."""
    if len(prompts) < 2:
        return 0
    length = 0
    for column in zip(*(prompt[:-1] for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def draw_tokens(logits_BV: Tensor, settings: SamplingSettings, noise: list[torch.Generator]) -> list[int]:
    """Draw one token a row by inverting the cumulative distribution at the row's own uniform number."""
    if settings.temperature == 0:
        return [int(token) for token in logits_BV.argmax(-1)]
    probability_BV = torch.softmax(logits_BV.double() / settings.temperature, dim=-1)
    order_BV = None
    if settings.top_p < 1:
        probability_BV, order_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = probability_BV.cumsum(-1) - probability_BV
        probability_BV = probability_BV.masked_fill(before_BV >= settings.top_p, 0.0)
    cumulative_BV = probability_BV.cumsum(-1)
    uniform_B1 = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in noise])
    threshold_B1 = uniform_B1 * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp(max=logits_BV.shape[1] - 1)
    if order_BV is not None:
        token_B1 = order_BV.gather(1, token_B1)
    return [int(token) for token in token_B1.squeeze(1)]
