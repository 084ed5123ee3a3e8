"""The backbone over a batch: hidden states at every position, packed or padded, without any head.

Legend: P flat positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.models.attention import TREE_ATTENTION, TreeMasks
from pipeline_lib.text.pack import TreeBatch


def hidden_states(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Run the backbone, without any head, over a batch.

    Returns:
        `(P, D)`, the last layer's output at every flat position.
    """
    backbone: nn.Module = model.base_model
    output = backbone(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False,
        **_attention_inputs(model, batch),
    )  # fmt: skip
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


def _attention_inputs(model: PreTrainedModel, batch: TreeBatch) -> dict[str, Any]:
    """Return what a backbone is told of who sees whom in a batch.

    A model with our attention gets the trees and a mask of one element, which only says that there
    is nothing to make; another gets the mask in the form that its attention takes.
    """
    if batch.visibility is None:
        return {"attention_mask": batch.token_mask_BT.long()}
    implementation: str = model.config._attn_implementation
    if implementation == TREE_ATTENTION:
        placeholder = batch.input_ids_BT.new_ones((1, 1, 1, 1), dtype=torch.bool)
        return {"attention_mask": placeholder, "tree_masks": TreeMasks(batch.visibility)}
    mask = batch.attention_mask
    if implementation == "eager":
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
    return {"attention_mask": mask}
