"""Which rows an optimizer step takes: a function of (seed, step), the same after any resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline_lib.errors import DataError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.settings import OfflineSettings, TrainingSettings


@dataclass(frozen=True)
class DataPlan:
    """Rows in a new order each epoch; every row exactly once an epoch."""

    trees: tuple[Tree, ...]
    settings: TrainingSettings
    held_out: tuple[Tree, ...] = ()
    """Rows that are measured for early stopping and not trained on."""

    @classmethod
    def of(cls, trees: Sequence[Tree], settings: TrainingSettings) -> DataPlan:
        """Make a plan, after choosing `max_rows` of the rows by the seed.

        Raises:
            DataError: There is no row.
        """
        if not trees:
            raise DataError(
                "no rows to train on",
                next_step="look at the funnel in the report: which rule rejected them, or which split is empty",
            )
        if settings.max_rows is not None and settings.max_rows < len(trees):
            chosen = permutation(len(trees), settings.seed, "rows")[: settings.max_rows]
            trees = [trees[index] for index in sorted(chosen)]
        if isinstance(settings, OfflineSettings) and settings.early_stopping is not None:
            trees, held_out = _hold_out(trees, settings.early_stopping.held_out_frac, settings.seed)
            return cls(tuple(trees), settings, tuple(held_out))
        return cls(tuple(trees), settings)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may hold fewer rows."""
        return math.ceil(len(self.trees) / self.settings.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        assert isinstance(self.settings, OfflineSettings), "online recipes count their steps themselves"
        planned = self.steps_per_epoch * self.settings.epochs
        return planned if self.settings.max_steps is None else min(planned, self.settings.max_steps)

    def rows(self, step: int) -> list[Tree]:
        """Return the rows of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = permutation(len(self.trees), self.settings.seed, "epoch", epoch)
        size = self.settings.batch_size
        return [self.trees[index] for index in order[place * size : (place + 1) * size]]

    def full_batch(self, number: int) -> list[Tree]:
        """Return a batch, counted from 0, that is always full.

        Epochs follow one another without a gap, so every row comes equally often; where there are
        fewer rows than a batch holds, some come twice in it.
        """
        size = self.settings.batch_size
        batch: list[Tree] = []
        while len(batch) < size:
            epoch, place = divmod(number * size + len(batch), len(self.trees))
            order = permutation(len(self.trees), self.settings.seed, "epoch", epoch)
            batch += [self.trees[index] for index in order[place : place + size - len(batch)]]
        return batch


def _hold_out(trees: Sequence[Tree], frac: float, seed: int) -> tuple[list[Tree], list[Tree]]:
    """Part rows into trained and held-out ones: no prompt, and no group of rows, is on both sides.

    Raises:
        DataError: There are too few prompts for two sides.
    """
    prompts = sorted({_held_together(tree) for tree in trees})
    num_held_out = max(1, round(frac * len(prompts)))
    if num_held_out >= len(prompts):
        raise DataError(
            f"{len(prompts)} different prompts are too few to hold {frac:.0%} out for early stopping",
            next_step="collect more rows, or set early_stopping: null",
        )
    chosen = {prompts[index] for index in permutation(len(prompts), seed, "held out")[:num_held_out]}
    return (
        [tree for tree in trees if _held_together(tree) not in chosen],
        [tree for tree in trees if _held_together(tree) in chosen],
    )


def _held_together(tree: Tree) -> tuple[str, tuple[int, ...]]:
    return (tree.group, ()) if tree.group else ("", tree.prompt_ids)


def permutation(size: int, seed: int, *scope: str | int) -> list[int]:
    """Return a random order of `size` indices, a function of (seed, scope)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, *scope))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
