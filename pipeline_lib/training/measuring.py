"""What models say of sampled responses, forward by forward, in the order of the responses.

Legend: N counted tokens, R responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline_lib.losses.tokens import compare_from_hidden
from pipeline_lib.models.logprobs import HEAD_CHUNK_TOKENS
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.divergence import head_states, reference_states
from pipeline_lib.training.recipe import StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.trained_model import TrainedModel


class ScoresResponses(Protocol):
    """A reward model, whatever base it stands on."""

    @property
    def is_packed(self) -> bool:
        """True where it takes prompt trees."""

    def scores(self, batch: TreeBatch) -> Tensor:
        """Score each response at its last token, `(R,)`, normalised."""

    def raw_scores(self, batch: TreeBatch) -> Tensor:
        """Score each response as the head does, `(R,)`."""


def scores_in_order(
    model: ScoresResponses,
    trees: Sequence[Tree],
    layout: Layout,
    *,
    device: torch.device,
    should_stop: Callable[[], bool],
    is_raw: bool = False,
) -> Tensor:
    """Score every response of some trees, `(R,)` on the CPU, tree by tree.

    Args:
        model: The reward model.
        trees: Their record ids need not differ.
        layout: How they become forwards; a model that takes no trees gets padded rows.
        device: Where the model is.
        should_stop: True once the process was asked to end.
        is_raw: Whether scores are as they come out of the head, or normalised.

    Raises:
        StopRequestedError: The process was asked to end.
    """
    score = model.raw_scores if is_raw else model.scores
    if layout.is_packed and not model.is_packed:
        layout = replace(layout, is_packed=False)
    found = _in_order(
        trees, layout, lambda batch: {"score_R": score(batch)}, lambda tree: len(tree.response_ids), device, should_stop
    )
    return found["score_R"]


@torch.no_grad()
def tokens_in_order(
    trees: Sequence[Tree],
    layout: Layout,
    figures_of: Callable[[TreeBatch], dict[str, Tensor]],
    *,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> dict[str, Tensor]:
    """Take figures of every response token of some trees, `(N,)` each on the CPU, tree by tree.

    Args:
        trees: Nothing of their prompts counts.
        layout: How they become forwards.
        figures_of: Returns the figures of a forward, `(N,)` each, by name.
        device: Where the models are.
        should_stop: True once the process was asked to end.

    Raises:
        StopRequestedError: The process was asked to end.
    """
    return _in_order(trees, layout, figures_of, lambda tree: sum(map(len, tree.response_ids)), device, should_stop)


@torch.no_grad()
def logps_and_kl(
    policy: TrainedModel, reference: Reference, batch: TreeBatch, *, temperature: float
) -> dict[str, Tensor]:
    """Return what policy and reference say of each token, under the names of `Rollouts`, nats.

    Args:
        policy: As it sampled.
        reference: What the KL is measured from.
        batch: The samples.
        temperature: The sampling temperature.
    """
    ref = reference_states(reference, batch)
    states = head_states(policy.model, batch)
    found = compare_from_hidden(states, ref, batch.label_N, chunk_tokens=HEAD_CHUNK_TOKENS, temperature=temperature)
    return found._asdict()


def _in_order(
    trees: Sequence[Tree],
    layout: Layout,
    figures_of: Callable[[TreeBatch], dict[str, Tensor]],
    size_of: Callable[[Tree], int],
    device: torch.device,
    should_stop: Callable[[], bool],
) -> dict[str, Tensor]:
    # A record id is a row's, which several trees may share: the place in the list is not.
    placed = [replace(tree, record_id=str(place)) for place, tree in enumerate(trees)]
    found: dict[int, dict[str, Tensor]] = {}
    for batch in layout.batches(placed):
        if should_stop():
            raise StopRequestedError
        sizes = [size_of(tree) for tree in batch.trees]
        flat = figures_of(batch.to(device))
        rows = {name: values.float().cpu().split(sizes) for name, values in flat.items()}
        for place, tree in enumerate(batch.trees):
            found[int(tree.record_id)] = {name: row[place] for name, row in rows.items()}
    return {name: torch.cat([found[place][name] for place in range(len(trees))]) for name in found[0]}
