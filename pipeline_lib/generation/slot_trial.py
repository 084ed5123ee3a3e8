"""Does a model take slots? Tried out, not listed: one that does not is sampled in batches."""

from __future__ import annotations

import json
import logging

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pipeline_lib.generation.prefill import Prefiller
from pipeline_lib.generation.slot_run import Row, next_logits
from pipeline_lib.generation.slots import SlotCache
from pipeline_lib.models.virtual_tokens import virtual_tokens_of

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Of the largest logit, in float32 and float64; a wrong position or mask changes much more."""
_COARSE_TOLERANCE = 0.05
"""In bf16 and fp16."""
_LONG, _SHORT = (8, 9, 10, 11, 12, 13), (8, 14, 15)
_VERDICTS: dict[str, bool] = {}
"""By architecture, number format and device: a process tries each once."""


def takes_slots(model: PreTrainedModel, *, longest: int) -> bool:
    """Tell whether a model can be sampled in slots.

    Every layer must keep the keys and values of all positions, and two prompts of uneven lengths must get the
    same next logits in slots and alone.

    Args:
        model: In evaluation mode.
        longest: Tokens of the longest prompt with its response.
    """
    tokens = virtual_tokens_of(model)
    if not _keeps_all(model, longest + (tokens.num_tokens if tokens is not None else 0)):
        return False
    key = json.dumps(
        [type(model).__name__, model.config.to_dict(), model.config._attn_implementation, str(model.dtype),
         model.device.type, tokens.kind if tokens is not None else None],
        sort_keys=True, default=str,
    )  # fmt: skip
    if key not in _VERDICTS:
        _VERDICTS[key] = _agrees(model)
        if not _VERDICTS[key]:
            _log.warning("models of type %r are sampled in batches, not in slots", model.config.model_type)
    return _VERDICTS[key]


def _keeps_all(model: PreTrainedModel, longest: int) -> bool:
    for layer in DynamicCache(config=model.config).layers:
        is_wide = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest
        if type(layer) is not DynamicLayer and not is_wide:
            return False
    return True


@torch.inference_mode()
def _agrees(model: PreTrainedModel) -> bool:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [[token % vocabulary for token in ids] for ids in (_LONG, _SHORT)]
    next_token = 16 % vocabulary
    try:
        cache, rows = SlotCache(len(prompts)), []
        for slot, prompt in enumerate(Prefiller(model, prompts[0][:1], pad_id=0).run(prompts)):
            cache.put(slot, prompt.states)
            columns = int(prompt.states[0][0].shape[1])
            rows.append(Row(slot, torch.Generator(), columns, prompt.num_virtual, [next_token]))
        found = next_logits(model, cache, rows)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        _log.info("%r in slots: %s", model.config.model_type, error)
        return False
    alone = [
        model(input_ids=torch.tensor([[*prompt, next_token]], device=model.device), use_cache=False).logits[0, -1]
        for prompt in prompts
    ]
    expected = torch.stack(alone).float().cpu()
    tolerance = _TOLERANCE if model.dtype in (torch.float32, torch.float64) else _COARSE_TOLERANCE
    # Weights that are not finite say nothing of the architecture; batches are then as good.
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
