"""All (better, worse) pairs of a batch of ranked responses; ties are no pair. Legend: P pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline_lib.text.pack import TreeBatch


@dataclass(frozen=True)
class RankedPairs:
    """All (better, worse) pairs of a batch as flat response indices."""

    better_P: Tensor
    worse_P: Tensor

    @classmethod
    def of(cls, batch: TreeBatch, ranks: Mapping[str, tuple[int, ...]]) -> RankedPairs:
        """List the pairs of every tree of a batch, in tree order.

        Args:
            batch: The trees.
            ranks: The ranks of each tree's responses by record id, 1 the best.
        """
        better: list[int] = []
        worse: list[int] = []
        first = 0
        for tree in batch.trees:
            places = ranks[tree.record_id]
            for i, rank_i in enumerate(places):
                for j, rank_j in enumerate(places):
                    if rank_i < rank_j:
                        better.append(first + i)
                        worse.append(first + j)
            first += len(places)
        device = batch.last_R.device
        return cls(
            torch.tensor(better, device=device, dtype=torch.long),
            torch.tensor(worse, device=device, dtype=torch.long),
        )
