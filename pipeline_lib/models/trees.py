"""Can a model run packed prompt trees? Tried out, not listed: a model that fails gets padded rows.

Legend: P flat positions, D width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.models.attention import TREE_ATTENTION, TreeMasks, register_tree_attention
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, pack, pad

_log = logging.getLogger(__name__)

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4}  # norms and rotations are float32 in most models
_COARSE_TOLERANCE = 0.05
"""Of the largest hidden value, in bf16 and fp16; a wrong mask or position changes much more."""
_FIRST_IDS = 8
"""Token ids of the trial: small ones, which every vocabulary has."""


@dataclass(frozen=True)
class Verdict:
    """What the trial of an architecture found."""

    takes_trees: bool
    finding: str
    is_sure: bool = True
    """False where the model's weights give no figures to compare."""


_VERDICTS: dict[tuple[str, torch.dtype, str], Verdict] = {}
"""By configuration, number format and device type: a process tries each architecture once."""


def supports_trees(model: PreTrainedModel, *, log: Callable[[str], None] = _log.warning) -> bool:
    """Tell whether a model takes packed prompt trees; if so, give it the attention for them.

    Two trees of two responses with one beginning run packed and padded; the hidden states from
    which tokens are predicted, and the last ones, must be equal.

    Args:
        model: A model with a backbone; its weights and its mode stay as they are.
        log: Where a fallback to padded rows is said, in one line.
    """
    if model.config._attn_implementation == TREE_ATTENTION:
        return True
    key = (_fingerprint(model), model.dtype, model.device.type)
    verdict = _VERDICTS.get(key)
    if verdict is None:
        verdict = _try_out(model)
        if verdict.is_sure:
            _VERDICTS[key] = verdict
        if not verdict.takes_trees:
            log(f"models of type {model.config.model_type!r} get padded rows, not packed trees: {verdict.finding}")
    elif verdict.takes_trees:
        _give_tree_attention(model)
    return verdict.takes_trees


def run_backbone(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Return the backbone's output, `(P, D)`, over padded rows, or over trees where it has our attention."""
    backbone: nn.Module = model.base_model
    if batch.visibility is None:
        masks: dict[str, object] = {"attention_mask": batch.token_mask_BT.long()}
    else:
        # A mask of one element only says that there is none to make.
        placeholder = batch.input_ids_BT.new_ones((1, 1, 1, 1), dtype=torch.bool)
        masks = {"attention_mask": placeholder, "tree_masks": TreeMasks(batch.visibility)}
    output = backbone(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False, **masks
    )  # fmt: skip
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


def _fingerprint(model: PreTrainedModel) -> str:
    values = model.config.to_dict()
    return json.dumps([type(model).__name__, values], sort_keys=True, default=str)


def _try_out(model: PreTrainedModel) -> Verdict:
    if getattr(model.config, "attention_chunk_size", None):
        return Verdict(takes_trees=False, finding="they attend in chunks of the row")
    before = model.config._attn_implementation
    try:
        with _evaluating(model), torch.no_grad():
            # The padded run is the model as it came, before our attention is in it.
            padded = _predicting_states(model, is_packed=False)
            if not _give_tree_attention(model):
                return Verdict(takes_trees=False, finding="their attention cannot be replaced")
            packed = _predicting_states(model, is_packed=True)
            again = _predicting_states(model, is_packed=False)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        _set_attention(model, before)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return Verdict(takes_trees=False, finding=first_line)
    if not bool(padded.isfinite().all()):
        # Broken weights say nothing of the architecture, and are found by name where they are trained.
        return Verdict(takes_trees=True, finding="the hidden states are not finite", is_sure=False)
    scale = float(padded.abs().max())
    apart = max(float((packed - padded).abs().max()), float((again - padded).abs().max())) / max(scale, 1e-30)
    tolerance = _TOLERANCES.get(model.dtype, _COARSE_TOLERANCE)
    if apart <= tolerance:
        return Verdict(takes_trees=True, finding=f"differ by {apart:.1e}")
    _set_attention(model, before)
    return Verdict(takes_trees=False, finding=f"packed and padded differ by {apart:.1e} of the largest value")


def _predicting_states(model: PreTrainedModel, *, is_packed: bool) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def ids(*numbers: int) -> tuple[int, ...]:
        return tuple((_FIRST_IDS + number) % vocabulary for number in numbers)

    shared = ids(1, 2, 3)
    trees = [
        Tree("0", (*shared, *ids(4, 5)), (ids(6, 7, 8, 9), ids(9, 6)), (False,) * 5),
        Tree("1", (*shared, *ids(10)), (ids(11, 4), ids(5, 12, 6, 2, 7)), (False,) * 4),
    ]
    batch = (pack(trees) if is_packed else pad(trees, pad_id=0)).to(model.device)
    return run_backbone(model, batch)[torch.cat((batch.source_N, batch.last_R))].double()


def _give_tree_attention(model: PreTrainedModel) -> bool:
    """Replace a model's attention by ours; False where it is not replaceable."""
    register_tree_attention()
    if model.config._attn_implementation != TREE_ATTENTION and model._can_set_attn_implementation():
        _set_attention(model, TREE_ATTENTION)
    implementation: str = model.config._attn_implementation
    return implementation == TREE_ATTENTION


def _set_attention(model: PreTrainedModel, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
