"""Where the processes of a stage keep the weights that they train: whole in each of them, or otherwise.

The other way is `training/sharding.py`. The loop knows neither: it asks for what is below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.recipe import ParameterGroup, Recipe

ResultT = TypeVar("ResultT")


class Weights(Protocol):
    """What the loop asks of the weights; all processes ask it in the same order."""

    groups: list[ParameterGroup]
    """What this process's optimizer holds of each group."""
    is_cut: bool
    """True where a process holds only its part of a weight."""

    def forward(self, compute: Callable[[], ResultT]) -> ResultT:
        """Run a forward whose loss goes backward next."""

    def measure(self, compute: Callable[[], ResultT]) -> ResultT:
        """Run something that may use the model, without a gradient."""

    def share(self, batches: Sequence[TreeBatch]) -> list[tuple[TreeBatch, bool]]:
        """Return this process's forwards of a step, and of each whether it counts."""

    def sum_gradients(self) -> None:
        """Give the groups' parameters the gradient that all processes' forwards have together."""

    def clip(self, group: ParameterGroup, max_norm: float) -> float:
        """Scale a group's gradient down to a norm; return the norm that it had, over all processes."""

    def whole(self, key: str, part: Tensor) -> Tensor:
        """Return all of a tensor that is laid out as a parameter, in the first process at least.

        Args:
            key: The parameter, `<group>/<name>`.
            part: What this process holds of the tensor.
        """

    def part(self, key: str, whole: Tensor) -> Tensor:
        """Return what this process holds of a whole tensor that is laid out as a parameter."""

    def finish(self) -> None:
        """Let every process have the whole trained model; `groups` are whole from then on."""


class WholeWeights:
    """Every process holds all weights."""

    is_cut = False

    def __init__(self, recipe: Recipe, processes: ProcessGroup) -> None:
        """Take what the recipe trains."""
        self.groups = list(recipe.parameter_groups())
        self._processes = processes

    def forward(self, compute: Callable[[], ResultT]) -> ResultT:
        """Run it."""
        return compute()

    def measure(self, compute: Callable[[], ResultT]) -> ResultT:
        """Run it."""
        return compute()

    def share(self, batches: Sequence[TreeBatch]) -> list[tuple[TreeBatch, bool]]:
        """Return every so many-th forward; some processes may have none."""
        return [(batch, True) for batch in self._processes.share(batches)]

    def sum_gradients(self) -> None:
        """Add the gradients of all processes up."""
        self._processes.sum_gradients(value for group in self.groups for value in group.parameters.values())

    def clip(self, group: ParameterGroup, max_norm: float) -> float:
        """Clip, each process by itself: they hold the same."""
        return float(nn.utils.clip_grad_norm_(group.parameters.values(), max_norm))

    def whole(self, key: str, part: Tensor) -> Tensor:  # noqa: ARG002
        """Return it."""
        return part

    def part(self, key: str, whole: Tensor) -> Tensor:  # noqa: ARG002
        """Return it."""
        return whole

    def finish(self) -> None:
        """Do nothing: they have it."""
