"""Stops for silent training faults: non-finite numbers, frozen or no-op training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from pipeline_lib.errors import DataError, DivergedError
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.recipe import ParameterGroup

_FINITE_ADVICE = "lower the learning rate, or train with `precision: fp32`; look at the rows named above"


def _rows(batches: Sequence[TreeBatch]) -> str:
    ids = [tree.record_id[:12] for batch in batches for tree in batch.trees]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def require_trainable(groups: Sequence[ParameterGroup]) -> None:
    """Stop before training where a model has no weight that could change.

    Raises:
        DivergedError: Naming the group.
    """
    for group in groups:
        if not group.parameters:
            raise DivergedError(
                f"{group.name} has no trainable weight: nothing is trained",
                next_step="check adapter.target_modules, or train all weights with `adapter: null`",
            )


def require_responses(batches: Sequence[TreeBatch]) -> None:
    """Stop where a row's response has no token: it would silently teach nothing.

    Raises:
        DataError: Naming the rows.
    """
    empty = [
        tree.record_id[:12]
        for batch in batches
        for tree in batch.trees
        if not tree.response_ids or not all(tree.response_ids)
    ]
    if empty:
        raise DataError(
            f"a response has no token in {len(empty)} rows of a step: {', '.join(empty[:8])}",
            next_step="raise max_response_tokens, or keep the filter rule `empty`",
        )


def require_finite(value: float, *, what: str, step: int, batches: Sequence[TreeBatch]) -> None:
    """Stop on a non-finite loss or gradient norm, naming the rows of the step.

    Raises:
        DivergedError: The value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} is {value} at step {step}; rows of the step: {_rows(batches)}",
            next_step=_FINITE_ADVICE,
            row_ids=tuple(tree.record_id for batch in batches for tree in batch.trees),
        )


def require_gradient(norm: float, *, step: int) -> None:
    """Stop where the first step has no gradient at all: nothing would be learnt.

    Raises:
        DivergedError: The norm is 0.
    """
    if norm == 0.0:
        raise DivergedError(
            f"the gradient is 0 at step {step}: nothing is trained",
            next_step="check that rows have response tokens within max_response_tokens and that something is trainable",
        )


def require_finite_weights(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Stop before non-finite weights are committed.

    Raises:
        DivergedError: Naming the parameter.
    """
    for name, parameter in parameters:
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError(f"the weights of {name} are not finite", next_step=_FINITE_ADVICE)
