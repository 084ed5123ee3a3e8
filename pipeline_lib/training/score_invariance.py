"""A score belongs to a prompt and a response: neither padding nor the company in a batch may move it.

The same responses are scored alone, padded beside longer ones, and packed into prompt trees. A
reward model that fails would rank a policy's rollouts by how they happen to be laid out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from pipeline_lib.errors import DivergedError
from pipeline_lib.models.scoring import Layout, response_scores
from pipeline_lib.text.encode import Tree

TOLERANCES: dict[torch.dtype, float] = {torch.float32: 1e-4}
"""Largest difference that arithmetic in another order explains, in units of the larger of 1 and the largest score."""
LOW_PRECISION_TOLERANCE = 5e-2
"""The same where activations keep 8 bits: bf16 and fp16."""
NUM_ROWS = 6

Scores = Mapping[str, Sequence[float]]


def score_differences(model: PreTrainedModel, trees: Sequence[Tree], layout: Layout) -> dict[str, float]:
    """Return how far scores move from those of each response alone, by layout.

    Args:
        model: The reward model.
        trees: Held-out comparisons; the shortest and the longest of them are taken.
        layout: How the stage lays trees out.

    Returns:
        The largest difference for `padded`, and for `packed` where the model takes prompt trees.

    Raises:
        DivergedError: A score is not a finite number.
    """
    chosen = _uneven(trees)
    return _differences(model, chosen, _alone(model, chosen, layout), layout)


def check_scores_do_not_move(
    model: PreTrainedModel, trees: Sequence[Tree], layout: Layout, *, dtype: torch.dtype
) -> dict[str, float]:
    """Stop where scores depend on padding or on the batch.

    Args:
        model: The trained reward model.
        trees: Held-out comparisons.
        layout: How the stage lays trees out.
        dtype: Format of the frozen weights and activations.

    Returns:
        The largest difference by layout, as `score_differences`.

    Raises:
        DivergedError: It is more than the number format explains, or a score is not finite.
    """
    chosen = _uneven(trees)
    alone = _alone(model, chosen, layout)
    differences = _differences(model, chosen, alone, layout)
    largest = max(abs(score) for scores in alone.values() for score in scores)
    limit = TOLERANCES.get(dtype, LOW_PRECISION_TOLERANCE) * max(1.0, largest)
    for name, difference in differences.items():
        if not difference <= limit:
            raise DivergedError(
                f"a {name} batch moves scores by {difference:.2e}, more than {limit:.0e}: they depend on the batch",
                next_step="the model does not honour masks or positions: use another base model, or report it",
            )
    return differences


def furthest(one: Scores, other: Scores) -> float:
    """Return the largest difference between two sets of scores of the same responses.

    Raises:
        ValueError: They are of different responses.
    """
    if one.keys() != other.keys():
        raise ValueError("the scores belong to different records")
    return max(abs(a - b) for name in one for a, b in zip(one[name], other[name], strict=True))


def _differences(model: PreTrainedModel, chosen: Sequence[Tree], alone: Scores, layout: Layout) -> dict[str, float]:
    everything = sum((len(tree.prompt_ids) + 1) * len(tree.response_ids) + tree.num_tokens for tree in chosen)
    together = replace(layout, tokens_per_batch=everything)
    _require_finite(alone)
    forms = {"padded": replace(together, is_packed=False)}
    if layout.is_packed:
        forms["packed"] = together
    return {name: furthest(alone, response_scores(model, chosen, form)) for name, form in forms.items()}


def _uneven(trees: Sequence[Tree]) -> list[Tree]:
    """Take the shortest and the longest trees, which differ most in their padding."""
    by_length = sorted(trees, key=lambda tree: (tree.num_tokens, tree.record_id))
    if len(by_length) <= NUM_ROWS:
        return by_length
    return [*by_length[: NUM_ROWS // 2], *by_length[-(NUM_ROWS - NUM_ROWS // 2) :]]


def _alone(model: PreTrainedModel, trees: Sequence[Tree], layout: Layout) -> dict[str, list[float]]:
    """Score each response in a forward of its own, without padding, packing or company."""
    single = replace(layout, is_packed=False, tokens_per_batch=1)
    found: dict[str, list[float]] = {}
    for tree in trees:
        parts = [replace(tree, response_ids=(ids,)) for ids in tree.response_ids]
        found[tree.record_id] = [response_scores(model, [part], single)[tree.record_id][0] for part in parts]
    return found


def _require_finite(scores: Scores) -> None:
    for record_id, row in scores.items():
        if not all(math.isfinite(score) for score in row):
            raise DivergedError(
                f"the reward model scores row {record_id[:12]} with {row}",
                next_step="lower the learning rate, or look at the rows of the last steps",
            )
