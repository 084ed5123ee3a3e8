"""What a recipe is: batch in, loss and figures out. How it is trained is the loop's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch


class StopRequestedError(Exception):
    """Raised inside a step that breaks off because the process was asked to end."""


class TrainingEndedError(Exception):
    """Raised where a step would begin, by a recipe that is done before its last step; says why."""


@dataclass(frozen=True)
class Figure:
    """A sum and the count it is a mean over, so that figures add up over micro-batches."""

    total: float
    count: float

    @property
    def mean(self) -> float:
        """The mean, 0 where nothing was counted."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class StepLoss:
    """The loss of one micro-batch, already divided by the count of the whole step."""

    loss: Tensor
    """Scalar; the sum over a step's micro-batches is the step's loss."""
    figures: dict[str, Figure]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and are clipped together."""

    name: str
    parameters: dict[str, nn.Parameter]
    """By a stable name, which is its key in checkpoints."""
    learning_rate: float


@dataclass(frozen=True)
class RecipeState:
    """What a recipe carries from step to step besides its parameters."""

    tensors: dict[str, Tensor]
    values: dict[str, float | int | str | bool | list[int] | list[str]]


class Recipe(Protocol):
    """The *what* of a training stage."""

    num_steps: int
    """Optimizer steps of the whole training."""

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return everything that is trained."""

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Return the forwards of an optimizer step; a function of (seed, step) and the state."""

    def training_forward(self, batch: TreeBatch) -> AbstractContextManager[None]:
        """Return the context that a forward's loss and gradient are computed in."""

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the loss of one forward, normalised by what all of the step's batches count."""

    def held_out_loss(self) -> float | None:
        """Return the loss on the rows held out for early stopping, without gradient; None without any."""

    def after_step(self, step: int) -> dict[str, float]:
        """Finish a step; return figures that belong to it as a whole."""

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:
        """Check the invariants of the first step, e.g. a DPO loss of ln 2; raise DivergedError."""

    def state(self) -> RecipeState:
        """Return what a checkpoint must hold besides parameters and optimizer."""

    def load_state(self, state: RecipeState) -> None:
        """Take a checkpoint's state back."""


@runtime_checkable
class NamesRows(Protocol):
    """A recipe whose trees are not rows themselves: messages name the rows that they come from."""

    def row_of(self, tree: Tree) -> str:
        """Return the id of the row that a tree comes from."""


@runtime_checkable
class Scored(Protocol):
    """A recipe whose weights may be chosen by a score, higher being better, instead of by the held-out loss."""

    def held_out_score(self) -> float | None:
        """Return the score of the weights as they are, without gradient; None where the loss decides."""
