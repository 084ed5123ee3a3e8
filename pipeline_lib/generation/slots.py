"""A key-value cache of slots: every row has columns of its own, written in place, none of them padding.

Legend: S slots, B rows in use, H heads, C columns, T columns in use, W width of a head.

transformers' dynamic cache appends a column to every layer by copying the layer, and a row that ends or
begins copies all others. Here a step writes one column a row, and the rows in use are the first slots,
so attention reads a view. Rows have different lengths: a row's columns behind its own are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

LayerStates = tuple[Tensor, Tensor]
"""Keys and values of a layer."""
GROWN_BY = 64
"""Columns that are added when there are too few."""


@dataclass
class _Step:
    """Which rows write which columns; one for all layers."""

    row_B: Tensor
    column_B: Tensor
    width: int
    """T, the written columns included."""
    before: int
    """Columns that are kept elsewhere, in front of these."""


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types here
    """One layer's keys and values, `(S, H, C, W)`."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self.step: _Step | None = None

    def reserve(self, slots: int, columns: int, like_HTW: Tensor, value_like_HTW: Tensor) -> None:
        """Make room for so many columns; what is there stays."""
        grown = []
        for old, like in ((self.keys, like_HTW), (self.values, value_like_HTW)):
            heads, _, width = like.shape
            # Zeros: what is masked is still multiplied, by 0, which makes no number of what is no number.
            new = like.new_zeros((slots, heads, columns, width))
            if old is not None:
                new[: old.shape[0], :, : old.shape[2]] = old
            grown.append(new)
        self.keys, self.values = grown
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: `reserve` has."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> LayerStates:  # noqa: ARG002
        """Write a step's `(B, H, 1, W)`; return all columns in use, `(B, H, T, W)`."""
        step = self.step
        assert step is not None
        self.keys[step.row_B, :, step.column_B] = key_states[:, :, 0]
        self.values[step.row_B, :, step.column_B] = value_states[:, :, 0]
        num = key_states.shape[0]
        return self.keys[:num, :, : step.width], self.values[:num, :, : step.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - a step has one query
        """Return how many columns there are with the step's and that the first is 0."""
        return self._width, 0

    def get_seq_length(self) -> int:
        """Return how many columns there were before the step."""
        return self._width - 1

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1

    @property
    def _width(self) -> int:
        assert self.step is not None
        return self.step.before + self.step.width


class SlotCache:
    """Keys and values of all layers, row by row."""

    def __init__(self, slots: int) -> None:
        """Take how many rows there may be at once; more are made room for when they come."""
        self.slots, self.columns = slots, 0
        self._layers: list[_SlotLayer] = []

    def put(self, slot: int, states: Sequence[LayerStates]) -> None:
        """Fill a slot's first columns.

        Args:
            slot: Which one.
            states: `(H, T, W)` of every layer.
        """
        length = int(states[0][0].shape[1])
        self.make_room(slot, length + 1, like=states)
        for layer, (key_HTW, value_HTW) in zip(self._layers, states, strict=True):
            layer.keys[slot, :, :length] = key_HTW
            layer.values[slot, :, :length] = value_HTW

    def make_room(self, slot: int, columns: int, *, like: Sequence[LayerStates]) -> None:
        """Have a slot, and so many columns of each.

        Args:
            slot: Which one.
            columns: Its columns.
            like: `(H, T, W)` of every layer, of which only H, W and the number format matter.
        """
        if slot < self.slots and columns <= self.columns:
            return
        self.slots = max(self.slots, slot + 1)
        if columns > self.columns:
            self.columns = -(-columns // GROWN_BY) * GROWN_BY
        if not self._layers:
            self._layers = [_SlotLayer() for _ in like]
        for layer, (key_HTW, value_HTW) in zip(self._layers, like, strict=True):
            layer.reserve(self.slots, self.columns, key_HTW, value_HTW)

    def move(self, source: int, target: int, *, length: int) -> None:
        """Copy a slot's first columns to another slot."""
        for layer in self._layers:
            for states in (layer.keys, layer.values):
                states[target, :, :length] = states[source, :, :length]

    def first(self, num: int, *, width: int) -> list[LayerStates]:
        """Return the first columns of the first slots, `(num, H, width, W)` of every layer; no copies."""
        return [(layer.keys[:num, :, :width], layer.values[:num, :, :width]) for layer in self._layers]

    def at(self, columns: Sequence[int], *, before: int = 0) -> tuple[Cache, Tensor]:
        """Return the cache for a step in which the first slots write these columns.

        Args:
            columns: One a row.
            before: Columns in front of them that are kept elsewhere.

        Returns:
            The cache, and which columns each row sees after writing, `(B, T)` bool.
        """
        width = max(columns) + 1
        self.make_room(0, width, like=[(layer.keys[0], layer.values[0]) for layer in self._layers])
        device = self._layers[0].keys.device
        column_B = torch.tensor(columns, device=device)
        step = _Step(torch.arange(len(columns), device=device), column_B, width, before)
        for layer in self._layers:
            layer.step = step
        return Cache(layers=list(self._layers)), torch.arange(width, device=device)[None] <= column_B[:, None]
