"""Exponential moving average of the trained weights (Polyak averaging; InstructGPT appendix C.4: 0.992)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline_lib.training.recipe import ParameterGroup


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after each step, starting at the first weights."""

    def __init__(self, groups: Sequence[ParameterGroup], decay: float) -> None:
        """Copy the weights as they are."""
        self.groups, self.decay = list(groups), decay
        self.averages = {key: parameter.detach().clone() for key, parameter in self._parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step's weights in."""
        for key, parameter in self._parameters():
            self.averages[key].lerp_(parameter.detach(), 1.0 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the averages into the parameters: what training ends with."""
        for key, parameter in self._parameters():
            parameter.copy_(self.averages[key])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run a block with the averages in place of the weights."""
        weights = {key: parameter.detach().clone() for key, parameter in self._parameters()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for key, parameter in self._parameters():
                    parameter.copy_(weights[key])

    def load(self, averages: dict[str, Tensor]) -> None:
        """Take a checkpoint's averages."""
        for key, value in averages.items():
            self.averages[key].copy_(value)

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (f"{group.name}/{name}", parameter) for group in self.groups for name, parameter in group.parameters.items()
        ]
