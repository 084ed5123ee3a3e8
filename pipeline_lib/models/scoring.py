"""One figure per response of many trees, without gradients: log-probabilities or scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.models.adapters import in_evaluation_mode
from pipeline_lib.models.heads import scores
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, bins, pack, pad, trunk_length


@dataclass(frozen=True)
class Layout:
    """How trees become forwards."""

    is_packed: bool
    """True: prompt trees in one row, for the models that take them; False: one padded row a response."""
    pad_id: int
    tokens_per_batch: int
    """Tokens of one forward, at most."""

    def batches(self, trees: Sequence[Tree]) -> list[TreeBatch]:
        """Lay trees out in as few forwards as the token budget allows."""
        shared = trunk_length(trees) if self.is_packed else 0
        return [
            self._batch([trees[index] for index in members])
            for members in bins(trees, token_budget=self.tokens_per_batch, shared=shared)
        ]

    def _batch(self, trees: list[Tree]) -> TreeBatch:
        return pack(trees) if self.is_packed else pad(trees, pad_id=self.pad_id)


def response_logps(
    model: PreTrainedModel, trees: Sequence[Tree], layout: Layout, *, on_batch: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """Return the log-probability of each response, nats summed over its tokens, by record id."""

    def logps(batch: TreeBatch) -> Tensor:
        return batch.sum_by_response(token_logps(model, batch).token_logp_N)

    return _by_record(trees, layout, model, logps, on_batch)


def response_scores(model: PreTrainedModel, trees: Sequence[Tree], layout: Layout) -> dict[str, list[float]]:
    """Return the raw reward-model score of each response, by record id."""
    return _by_record(trees, layout, model, lambda batch: scores(model, batch), None)


def _by_record(
    trees: Sequence[Tree],
    layout: Layout,
    model: PreTrainedModel,
    figure_of: Callable[[TreeBatch], Tensor],
    on_batch: Callable[[int], None] | None,
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    if layout.is_packed and not supports_trees(model):
        layout = replace(layout, is_packed=False)
    for batch in layout.batches(trees):
        with torch.no_grad(), in_evaluation_mode(model):
            flat = figure_of(batch.to(model.device)).tolist()
        start = 0
        for tree in batch.trees:
            found[tree.record_id] = flat[start : start + len(tree.response_ids)]
            start += len(tree.response_ids)
        if on_batch is not None:
            on_batch(len(found))
    return found
