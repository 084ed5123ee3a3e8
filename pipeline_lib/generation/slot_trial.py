"""How does a model take slots? Tried out, not listed: one that does not at all is sampled in batches."""

from __future__ import annotations

import json
import logging

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipeline_lib.generation.prefill import Prefiller
from pipeline_lib.generation.prompt_slots import CopiedPrompts, PromptSlots
from pipeline_lib.generation.shared_prompts import SharedPrompts
from pipeline_lib.generation.slot_run import Row, next_logits
from pipeline_lib.models.virtual_tokens import virtual_tokens_of

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Of the largest logit, in float32 and float64; a wrong position or mask changes much more."""
_COARSE_TOLERANCE = 0.05
"""In bf16 and fp16."""
_LONG, _SHORT = (8, 9, 10, 11, 12, 13), (8, 14, 15)
_RESPONSES = ((0, 16, 17), (1, 18, 19), (0, 18, 16))
"""Rows of the trial: which prompt, and what is written behind it."""
_VERDICTS: dict[str, type[PromptSlots] | None] = {}
"""By architecture, number format and device: a process tries each once."""


def slots_of(model: PreTrainedModel, *, longest: int) -> type[PromptSlots] | None:
    """Tell how a model can be sampled in slots; None: not at all.

    Every layer must keep the keys and values of all positions, and rows behind two prompts of uneven lengths must
    get the same next logits in slots and alone. Prompts are shared where the model's attention can be replaced.

    Args:
        model: In evaluation mode.
        longest: Tokens of the longest prompt with its response.
    """
    tokens = virtual_tokens_of(model)
    if not _keeps_all(model, longest + (tokens.num_tokens if tokens is not None else 0)):
        return None
    key = json.dumps(
        [type(model).__name__, model.config.to_dict(), model.config._attn_implementation, str(model.dtype),
         model.device.type, tokens.kind if tokens is not None else None],
        sort_keys=True, default=str,
    )  # fmt: skip
    if key not in _VERDICTS:
        _VERDICTS[key] = _try_out(model)
    return _VERDICTS[key]


def _try_out(model: PreTrainedModel) -> type[PromptSlots] | None:
    kind = model.config.model_type
    if _agrees(model, SharedPrompts):
        return SharedPrompts
    if _agrees(model, CopiedPrompts):
        _log.warning("models of type %r keep a prompt's keys and values once for each of its samples", kind)
        return CopiedPrompts
    _log.warning("models of type %r are sampled in batches, not in slots", kind)
    return None


def _keeps_all(model: PreTrainedModel, longest: int) -> bool:
    for layer in DynamicCache(config=model.config).layers:
        is_wide = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest
        if type(layer) is not DynamicLayer and not is_wide:
            return False
    return True


@torch.inference_mode()
def _agrees(model: PreTrainedModel, kind: type[PromptSlots]) -> bool:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [[token % vocabulary for token in ids] for ids in (_LONG, _SHORT)]
    responses = [(prompt, [token % vocabulary for token in ids]) for prompt, *ids in _RESPONSES]
    try:
        found = _in_slots(model, kind(len(responses)), prompts, responses)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        _log.info("%r with %s: %s", model.config.model_type, kind.__name__, error)
        return False
    alone = [
        model(input_ids=torch.tensor([prompts[prompt] + ids], device=model.device), use_cache=False).logits[0, -1]
        for prompt, ids in responses
    ]
    expected = torch.stack(alone).float().cpu()
    tolerance = _TOLERANCE if model.dtype in (torch.float32, torch.float64) else _COARSE_TOLERANCE
    # Weights that are not finite say nothing of the architecture; batches are then as good.
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _in_slots(
    model: PreTrainedModel, slots: PromptSlots, prompts: list[list[int]], responses: list[tuple[int, list[int]]]
) -> Tensor:
    """Return the logits behind every response, `(B, V)`."""
    prefilled = Prefiller(model, prompts[0][:1], pad_id=0).run(prompts)
    for index, prompt in enumerate(prefilled):
        slots.hold(index, prompt.states)
    rows = []
    for slot, (index, _) in enumerate(responses):
        slots.begin(slot, index)
        columns, num_virtual = int(prefilled[index].states[0][0].shape[1]), prefilled[index].num_virtual
        rows.append(Row(slot, torch.Generator(), columns, num_virtual))
    for step in range(len(responses[0][1])):
        for row, (_, ids) in zip(rows, responses, strict=True):
            row.ids.append(ids[step])
        logits_BV = next_logits(model, slots, rows)
    return logits_BV
