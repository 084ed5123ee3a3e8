"""The backbone over a batch: hidden states at every position, packed or padded, without any head.

Legend: P flat positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline_lib.models.trees import run_backbone, supports_trees
from pipeline_lib.text.pack import TreeBatch

_GATED = ("gate_proj", "up_proj", "down_proj")
"""Parts of a feed-forward that treats every position by itself."""


def hidden_states(model: PreTrainedModel, batch: TreeBatch, *, read: Tensor | None = None) -> Tensor:
    """Run the backbone, without any head, over a batch.

    Args:
        model: With or without an adapter in it.
        batch: The trees.
        read: Flat positions that will be read, in any order; None: all.

    Returns:
        `(P, D)`, the last layer's output at every flat position; where nothing is read it says nothing.

    Raises:
        ValueError: The batch is packed and the model takes padded rows alone.
    """
    if batch.is_packed and not supports_trees(model):
        raise ValueError(f"a {model.config.model_type!r} model takes padded rows: ask supports_trees before packing")
    feed_forward = None if read is None else _last_feed_forward(model)
    if feed_forward is None or read is None:
        return run_backbone(model, batch)
    with _only_at(feed_forward, read.unique(), batch.input_ids_BT.shape):
        return run_backbone(model, batch)


def _last_feed_forward(model: PreTrainedModel) -> nn.Module | None:
    """Return the last layer's feed-forward: behind it no position sees another. None where it is not a plain one."""
    backbone: nn.Module = model.base_model
    layers = getattr(backbone, "layers", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) else None
    if not isinstance(last, GradientCheckpointingLayer) or last.gradient_checkpointing:
        return None  # what is computed again is so after these hooks are gone
    found = getattr(last, "mlp", None)
    if not isinstance(found, nn.Module) or found._forward_hooks or found._forward_pre_hooks:
        return None
    return found if all(hasattr(found, name) for name in _GATED) else None


@contextmanager
def _only_at(feed_forward: nn.Module, read_P: Tensor, shape: torch.Size) -> Iterator[None]:
    """Let a feed-forward run at some flat positions alone, and say 0 at the others."""
    gathered: list[Tensor] = []

    def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG001
        # Virtual tokens stand in front of the row: its positions are others then.
        if len(inputs) != 1 or inputs[0].shape[:2] != shape:
            return None
        gathered.append(read_P)
        return (inputs[0].flatten(0, 1)[read_P][None],)

    def scatter(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:  # noqa: ARG001
        if not gathered:
            return None
        whole_PD = output.new_zeros((shape.numel(), output.shape[-1]))
        return whole_PD.index_copy(0, read_P, output[0]).view(*shape, -1)

    handles = [feed_forward.register_forward_pre_hook(gather), feed_forward.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
