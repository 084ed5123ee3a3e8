"""The backbone over a batch: hidden states at every position, packed or padded, without any head.

Legend: P flat positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
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
    if read is None:
        return run_backbone(model, batch)
    with _only_at(_last_parts(model), read.unique(), batch.input_ids_BT.shape):
        return run_backbone(model, batch)


def _last_parts(model: PreTrainedModel) -> list[nn.Module]:
    """Return what comes behind the last attention, where no position sees another: its output and the feed-forward.

    None of it where the layer is not a plain one.
    """
    backbone: nn.Module = model.base_model
    layers = getattr(backbone, "layers", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) else None
    if not isinstance(last, GradientCheckpointingLayer) or last.gradient_checkpointing:
        return []  # what is computed again is so after these hooks are gone
    feed_forward = getattr(last, "mlp", None)
    if not all(hasattr(feed_forward, name) for name in _GATED):
        return []
    found = [feed_forward, getattr(getattr(last, "self_attn", None), "o_proj", None)]
    return [part for part in found if isinstance(part, nn.Module) and not part._forward_hooks | part._forward_pre_hooks]


@contextmanager
def _only_at(parts: Sequence[nn.Module], read_P: Tensor, shape: torch.Size) -> Iterator[None]:
    """Let parts of a layer run at some flat positions alone, and say 0 at the others."""
    with ExitStack() as hooks:
        for part in parts:
            for handle in _hook(part, read_P, shape):
                hooks.callback(handle.remove)
        yield


def _hook(part: nn.Module, read_P: Tensor, shape: torch.Size) -> tuple[RemovableHandle, RemovableHandle]:
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

    return part.register_forward_pre_hook(gather), part.register_forward_hook(scatter)
