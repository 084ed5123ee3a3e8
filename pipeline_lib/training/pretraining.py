"""Pretraining text beside a training's own rows: which pieces a step takes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.plan import permutation

TEXT = "text:"
"""Prefix of the record id of a piece of pretraining text."""


@dataclass(frozen=True)
class PretrainingRows:
    """Pieces of text, a new order each time all were taken; every piece equally often."""

    trees: tuple[Tree, ...]
    coef: float
    """Weight of their loss."""
    rows_per_step: int
    seed: int

    def rows(self, step: int) -> list[Tree]:
        """Return the pieces of a step, counted from 0: a function of (seed, step)."""
        batch: list[Tree] = []
        while len(batch) < self.rows_per_step:
            epoch, place = divmod(step * self.rows_per_step + len(batch), len(self.trees))
            order = permutation(len(self.trees), self.seed, "pretraining", epoch)
            batch += [self.trees[index] for index in order[place : place + self.rows_per_step - len(batch)]]
        return batch


def is_pretraining(batch: TreeBatch) -> bool:
    """Tell whether a forward holds pretraining text; it then holds nothing else."""
    return batch.trees[0].record_id.startswith(TEXT)
