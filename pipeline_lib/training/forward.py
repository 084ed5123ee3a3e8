"""What is different in a training forward: noisy embeddings, recomputed activations.

Everything here is on while a step's loss and gradient are computed and off for whatever else a
model does (sampling, scoring, measuring held-out rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline_lib.errors import ConfigError
from pipeline_lib.text.pack import TreeBatch


@contextmanager
def training_forward(
    models: Sequence[PreTrainedModel],
    batch: TreeBatch,
    *,
    gradient_checkpointing: bool = False,
    neftune_alpha: float | None = None,
) -> Iterator[None]:
    """Make models ready for one training forward and its backward.

    Args:
        models: Every model that the loss runs with a gradient.
        batch: The forward's batch.
        gradient_checkpointing: Keep activations at layer borders only.
        neftune_alpha: Scale of the embedding noise; None adds none.

    Raises:
        ConfigError: A model has no layers that can compute their activations again.
    """
    with ExitStack() as stack:
        for model in models:
            if gradient_checkpointing:
                stack.enter_context(_recomputed(model))
            if neftune_alpha is not None:
                stack.enter_context(_noisy(model, batch, neftune_alpha))
        yield


@contextmanager
def _recomputed(model: PreTrainedModel) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"a {model.config.model_type!r} model cannot compute its activations again",
            next_step="set gradient_checkpointing: false, and lower tokens_per_batch where memory is short",
        )
    before = [layer.training for layer in layers]
    for layer, was_training in zip(layers, before, strict=True):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(_checkpointed, layer, was_training=was_training)
        layer.training = True  # this module's flag alone, which asks for recomputation
    try:
        yield
    finally:
        for layer, was_training in zip(layers, before, strict=True):
            layer.gradient_checkpointing = False
            layer.training = was_training


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], *args: Any, was_training: bool) -> Any:
    """Run a layer's forward in the mode that the layer was in: some take the flag for their own dropout's."""

    def run(*inputs: Any) -> Any:
        layer.training = was_training
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False)


def noise_bound_BT(batch: TreeBatch, *, width: int, alpha: float) -> Tensor:
    """Return NEFTune's bound alpha / sqrt(L d) for every position of a batch.

    L is the length of the longest text that the position is part of: its prompt and the longest of
    its responses. In a padded batch every row is a text; what all trees share has the longest L.

    Args:
        batch: The batch, `(B, T)` positions.
        width: d, the embeddings' width.
        alpha: The noise scale.

    Source: Jain et al. 2023 (arXiv 2310.05914), algorithm 1.
    """
    lengths = [len(tree.prompt_ids) + max(map(len, tree.response_ids), default=0) for tree in batch.trees]
    rows, columns = batch.input_ids_BT.shape
    length_BT = torch.full((rows, columns), float(max(lengths)))
    if not batch.is_packed:
        # Padding is noisy too; nothing attends to it.
        length_BT = batch.token_mask_BT.sum(-1, keepdim=True).clamp(min=1).float().expand(rows, columns)
    else:
        own = [tree.num_tokens for tree in batch.trees]
        trunk = (sum(own) - columns) // max(1, len(own) - 1) if len(own) > 1 else 0
        start = trunk
        for length, num_tokens in zip(lengths, own, strict=True):
            length_BT[0, start : start + num_tokens - trunk] = float(length)
            start += num_tokens - trunk
    return alpha / (length_BT * width).sqrt()


@contextmanager
def _noisy(model: PreTrainedModel, batch: TreeBatch, alpha: float) -> Iterator[None]:
    embedding = model.get_input_embeddings()

    def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        if not torch.is_grad_enabled():
            return output  # a reference under the same roof
        bound_BT = noise_bound_BT(batch, width=output.shape[-1], alpha=alpha).to(output.device)
        uniform_BTD = torch.rand_like(output, dtype=torch.float32) * 2 - 1
        return output + (uniform_BTD * bound_BT[..., None]).to(output.dtype)

    handle = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()
