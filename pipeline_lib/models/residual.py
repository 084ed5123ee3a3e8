"""Where a transformer's sub-layers join its residual stream, and dropout there. Tried out, not listed.

Legend: P flat positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.adapters import in_evaluation_mode

_NORMS_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Where a layer has both, they are its sub-layers' ends (Gemma 2 and 3, OLMo 2)."""
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "fc2")
_TRIAL_IDS = (8, 9, 10, 11)
"""Token ids of the trial: small ones, which every vocabulary has."""


def residual_branches(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose outputs a model adds to its residual stream, two a layer.

    They are found by name and then tried: where all of them give 0, every layer must hand its input
    on unchanged.

    Args:
        model: Its weights and its mode stay as they are.

    Raises:
        ConfigError: The model's layers are built otherwise.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    branches = [branch for layer in layers for branch in _branches_of(layer)]
    if len(branches) == 2 * len(layers) > 0 and _are_all(model, layers, branches):
        return branches
    raise ConfigError(
        f"where the sub-layers of a {model.config.model_type!r} model join its residual stream is not known",
        next_step="set residual_dropout: 0",
    )


@contextmanager
def dropped(branches: Sequence[nn.Module], dropout: float) -> Iterator[None]:
    """Drop entries of the branches' outputs for a while, wherever a gradient is taken, and scale up the others.

    That is the residual dropout of Vaswani et al. 2017 (arXiv 1706.03762), section 5.4, and GPT-2's
    `resid_pdrop`. The draws are torch's own.

    Args:
        branches: As `residual_branches` returned them.
        dropout: Share that is dropped, 0 to 1.
    """

    def drop(hidden: Tensor) -> Tensor:
        # Without a gradient it is a reference under the same roof, or a measurement.
        return nn.functional.dropout(hidden, p=dropout) if torch.is_grad_enabled() else hidden

    with _changed(branches, drop):
        yield


def _branches_of(layer: nn.Module) -> list[nn.Module]:
    children = dict(layer.named_children())
    if all(name in children for name in _NORMS_BEHIND):
        return [children[name] for name in _NORMS_BEHIND]
    found = (
        next((children[name] for name in names if name in children), None) for names in (_ATTENTION, _FEED_FORWARD)
    )
    return [branch for branch in found if branch is not None]


def _are_all(model: PreTrainedModel, layers: Sequence[nn.Module], branches: Sequence[nn.Module]) -> bool:
    """Tell whether every layer hands its input on where the branches give 0."""
    are_unchanged: list[bool] = []

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
        given = args[0] if args else kwargs["hidden_states"]
        are_unchanged.append(torch.equal(_hidden(output), given))

    backbone: nn.Module = model.base_model
    with ExitStack() as stack, in_evaluation_mode(model), torch.no_grad():
        stack.enter_context(_changed(branches, torch.zeros_like))
        for layer in layers:
            stack.callback(layer.register_forward_hook(compare, with_kwargs=True).remove)
        backbone(input_ids=torch.tensor([_TRIAL_IDS], device=model.device), use_cache=False)
    return len(are_unchanged) == len(layers) and all(are_unchanged)


@contextmanager
def _changed(branches: Sequence[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the outputs of modules for a while; of a tuple, what is first."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG001
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    with ExitStack() as stack:
        for branch in branches:
            stack.callback(branch.register_forward_hook(hook).remove)
        yield


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
