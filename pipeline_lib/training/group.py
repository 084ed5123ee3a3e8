"""The processes that train one model together: who they are, and how their figures are added up.

Every process holds the whole model and the whole plan; of a step's forwards each takes its share,
and gradients and figures are summed over all. The normalisation is by the whole step, so the sum is
the gradient that one process would have had, whatever their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from pipeline_lib.training.recipe import Figure

ItemT = TypeVar("ItemT")


class ProcessGroup:
    """This process's place among the processes of a stage; alone unless torch's variables say otherwise."""

    def __init__(self) -> None:
        """Join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, or be alone."""
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and not distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(self.rank % torch.cuda.device_count())
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")

    @property
    def is_first(self) -> bool:
        """True for the process that writes results."""
        return self.rank == 0

    def share(self, items: Sequence[ItemT]) -> list[ItemT]:
        """Return this process's part of a step's forwards; parts are disjoint and complete."""
        return list(items[self.rank :: self.size])

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes up; one without any forward counts as 0."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def sum_figures(self, figures: dict[str, Figure]) -> dict[str, Figure]:
        """Add the figures of all processes up, by name."""
        if self.size == 1:
            return figures
        everyones: list[Any] = [None] * self.size
        distributed.all_gather_object(everyones, figures)
        totals: dict[str, Figure] = {}
        for one in everyones:
            add_figures(totals, one)
        return totals

    def once(self, make: Callable[[], ItemT]) -> ItemT:
        """Return, in every process, what the first one alone makes."""
        made = self.from_first(make() if self.is_first else None)
        assert made is not None
        return made

    def from_first(self, value: ItemT) -> ItemT:
        """Return what the first process gave, in every process."""
        if self.size == 1:
            return value
        holder: list[Any] = [value]
        distributed.broadcast_object_list(holder, src=0)
        received: ItemT = holder[0]
        return received


def add_figures(totals: dict[str, Figure], figures: dict[str, Figure]) -> None:
    """Add figures into totals, name by name."""
    for name, figure in figures.items():
        before = totals.get(name, Figure(0.0, 0.0))
        totals[name] = Figure(before.total + figure.total, before.count + figure.count)
