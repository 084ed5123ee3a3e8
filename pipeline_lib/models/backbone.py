"""The backbone over a batch: hidden states at every position, packed or padded, without any head.

Legend: P flat positions, D width.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.models.trees import run_backbone, supports_trees
from pipeline_lib.text.pack import TreeBatch


def hidden_states(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Run the backbone, without any head, over a batch.

    Returns:
        `(P, D)`, the last layer's output at every flat position.

    Raises:
        ValueError: The batch is packed and the model takes padded rows alone.
    """
    if batch.is_packed and not supports_trees(model):
        raise ValueError(f"a {model.config.model_type!r} model takes padded rows: ask supports_trees before packing")
    return run_backbone(model, batch)
