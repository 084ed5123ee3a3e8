"""Merge adapters into the weights, and prove that the merged model is the one that was trained.

Legend: T columns, V vocabulary.
"""

from __future__ import annotations

import logging

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.errors import DivergedError
from pipeline_lib.models.adapters import in_evaluation_mode, without_adapter
from pipeline_lib.models.quantized import merge_quantized

logger = logging.getLogger(__name__)

_RELATIVE_TOLERANCE = 1e-4
"""Logits of merged and adapted model, both in fp32, may differ by this share of the largest (at least 1) ..."""
MAX_LOGIT_DIFFERENCE = 1e-3
"""... and by no more than this."""
_NOISE_FRAC = 1e-6
"""Outputs that training moved by no more than this share of their size were not moved: fp32 adds up that coarsely."""
_LOST_FRAC = 0.98
"""A stored model as far from the trained one as this share of what training moved it by has learnt nothing ..."""
_ALARMING_LOSS_FRAC = 0.5
"""... and from this share on that is said."""
_NUM_PROMPTS = 10
_PROMPT_TOKENS = 12


def merge(wrapper: PeftModel, *, dtype: torch.dtype) -> PreTrainedModel:
    """Add the adapters into the weights and take them out, in fp32, then round to the storage format.

    Ten prompts are answered before and after: the merged model must say what the adapted one said,
    and, as it is stored, something else than the base.

    Args:
        wrapper: The adapted model.
        dtype: The format that the weights will be stored in.

    Returns:
        The model without adapters, in that format.

    Raises:
        DivergedError: The merged weights are not finite or not those of the adapted model, or
            training changed nothing that survives in the storage format.
    """
    model: PreTrainedModel = wrapper.get_base_model()
    with in_evaluation_mode(model), torch.no_grad():
        merge_target = model.float()
        adapted = _answers(merge_target)
        with without_adapter(wrapper):
            base = _answers(merge_target)
        merge_quantized(merge_target)
        try:
            merged: PreTrainedModel = wrapper.merge_and_unload(safe_merge=True)
        except ValueError as error:  # peft says so of weights that are not finite
            raise DivergedError(
                f"the adapters cannot be merged: {error}", next_step="lower the learning rate"
            ) from error
        _require_same(_answers(merged), adapted)
        stored = _answers(merged.to(dtype).float())
    moved, lost = float((adapted - base).abs().mean()), float((stored - adapted).abs().mean())
    if moved <= _NOISE_FRAC * float(base.abs().mean()) or lost >= _LOST_FRAC * moved:
        raise DivergedError(
            f"training changed no weight in the storage format {dtype}",
            next_step="raise the learning rate or the number of steps",
        )
    if lost > _ALARMING_LOSS_FRAC * moved:
        logger.warning("rounding to %s moves the model by %.0f %% of what training moved it", dtype, 100 * lost / moved)
    return merged.to(dtype)


def _require_same(merged: Tensor, adapted: Tensor) -> None:
    apart = float((merged - adapted).abs().max())
    allowed = min(MAX_LOGIT_DIFFERENCE, _RELATIVE_TOLERANCE * max(1.0, float(adapted.abs().max())))
    if not apart <= allowed:
        raise DivergedError(
            f"the merged model is not the adapted one: outputs differ by up to {apart:.2e}, {allowed:.2e} are allowed",
            next_step="report this as a bug with the configuration; nothing was saved",
        )


def _answers(model: PreTrainedModel) -> Tensor:
    """Run ten fixed prompts; logits of a language model, scores of a reward model."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, model.config.vocab_size, (_NUM_PROMPTS, _PROMPT_TOKENS), generator=generator)
    backbone: nn.Module = model.base_model
    hidden: Tensor = backbone(input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    answers: Tensor = hidden if head is None else head(hidden[:, -1])
    return answers.float().cpu()
