"""Stops for silent training faults: non-finite numbers, frozen or no-op training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline_lib.errors import DataError, DivergedError
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.recipe import ParameterGroup

START_TOLERANCE_NATS_PER_TOKEN = 1e-5
"""How far a policy that samples may be from its reference before the first update."""
_FINITE_ADVICE = "lower the learning rate, or train with `precision: fp32`; look at the rows named above"


def named_rows(rows: Sequence[str]) -> str:
    """Return the beginnings of the first ids, and how many more there are, for a message."""
    return ", ".join(row[:12] for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


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


def require_finite(value: float, *, what: str, step: int, rows: Sequence[str]) -> None:
    """Stop on a non-finite loss or gradient norm, naming the rows of the step.

    Args:
        value: The number.
        what: What it is, in words.
        step: Counted from 0.
        rows: Ids of the rows that it comes from.

    Raises:
        DivergedError: The value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} is {value} at step {step}; rows of the step: {named_rows(rows)}",
            next_step=_FINITE_ADVICE,
            row_ids=tuple(rows),
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


@torch.no_grad()
def require_finite_weights(groups: Sequence[ParameterGroup], *, step: int, rows: Sequence[str]) -> None:
    """Stop before non-finite weights are trained on or committed, naming the rows of the step that made them.

    Raises:
        DivergedError: Naming the parameter.
    """
    named = {f"{group.name}/{name}": value for group in groups for name, value in group.parameters.items()}
    # One number for all of them first: to look at each is to wait for the device as often. Of a divided weight a
    # process may hold nothing.
    held = [value for value in named.values() if value.numel()]
    if not held or math.isfinite(float(nn.utils.get_total_norm(held, math.inf))):
        return
    name = next(name for name, value in named.items() if not bool(torch.isfinite(value).all()))
    raise DivergedError(
        f"the weights of {name} are not finite after step {step}; rows of the step: {named_rows(rows)}",
        next_step=_FINITE_ADVICE,
        row_ids=tuple(rows),
    )


def require_start_at_reference(logp_N: Tensor, ref_logp_N: Tensor, *, step: int) -> None:
    """Stop where the first rollouts show a KL: the policy must start as its reference.

    Args:
        logp_N: Log-probabilities of the sampled tokens by the policy, nats.
        ref_logp_N: The same by the reference.
        step: Which step begins.

    Raises:
        DivergedError: They differ.
    """
    apart = float((logp_N - ref_logp_N).abs().mean())
    if apart > START_TOLERANCE_NATS_PER_TOKEN:
        raise DivergedError(
            f"at step {step} policy and reference differ by {apart:.2e} nats a token; they must be one model",
            next_step="the reference must be the model that the policy starts from: report this as a bug",
        )


def require_kl_within(kl_nats: float, *, limit_nats: float, iteration: int, next_step: str) -> None:
    """Stop where the policy ran away from its reference.

    Args:
        kl_nats: Mean KL of an iteration's responses.
        limit_nats: `max_kl_nats`.
        iteration: Counted from 0.
        next_step: What to turn.

    Raises:
        DivergedError: The KL is above the limit.
    """
    if kl_nats > limit_nats:
        raise DivergedError(
            f"KL explosion in iteration {iteration + 1}: {kl_nats:.1f} nats a response from the reference, "
            f"the limit is {limit_nats:.1f}",
            next_step=next_step,
        )
