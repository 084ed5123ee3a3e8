"""Where the prompts of a run of slots keep their keys and values: what a run asks of it, and the plain way.

The plain way takes every model that takes slots: each row begins with a copy of its prompt's keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from transformers import PreTrainedModel

from pipeline_lib.generation.slots import LayerStates, SlotCache


class PromptSlots(Protocol):
    """Keys and values of the rows in use, which are those of the first slots, and of their prompts."""

    def __init__(self, slots: int) -> None:
        """Take how many rows there may be at once."""

    def hold(self, prompt: int, states: Sequence[LayerStates]) -> None:
        """Keep a prompt for rows to come.

        Args:
            prompt: Its number.
            states: `(H, T, W)` of every layer.
        """

    def begin(self, slot: int, prompt: int) -> None:
        """Begin a row behind a prompt that is held, in the first slot that is free."""

    def let_go(self, prompt: int) -> None:
        """No more rows begin behind this prompt."""

    def vacate(self, slot: int, *, last: int, length: int) -> None:
        """End a slot's row; the row of the last slot in use, with so many columns, takes its place."""

    def inputs(self, columns: Sequence[int], *, num_virtual: int) -> dict[str, Any]:
        """Return what a forward gets besides tokens and positions.

        Args:
            columns: Columns of each row so far, its prompt's included; the step writes one more.
            num_virtual: Virtual tokens that stand before every prompt.
        """

    def attending(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let a model attend to what is kept here while it computes a step."""


class CopiedPrompts:
    """A copy of its prompt's keys and values for each row."""

    def __init__(self, slots: int) -> None:
        """Take how many rows there may be at once."""
        self._rows = SlotCache(slots)
        self._held: dict[int, Sequence[LayerStates]] = {}

    def hold(self, prompt: int, states: Sequence[LayerStates]) -> None:
        """Keep a prompt for rows to come; see `PromptSlots`."""
        self._held[prompt] = states

    def begin(self, slot: int, prompt: int) -> None:
        """Copy a prompt into a slot."""
        self._rows.put(slot, self._held[prompt])

    def let_go(self, prompt: int) -> None:
        """Forget a prompt: its rows have copies."""
        del self._held[prompt]

    def vacate(self, slot: int, *, last: int, length: int) -> None:
        """Move the last row to where one has ended."""
        if slot < last:
            self._rows.move(last, slot, length=length)

    def inputs(self, columns: Sequence[int], *, num_virtual: int) -> dict[str, Any]:
        """Return the cache and which columns are seen; see `PromptSlots`."""
        states, seen_BT = self._rows.at(columns)
        # The backbone puts virtual tokens in front of masks and positions by itself.
        return {"past_key_values": states, "attention_mask": seen_BT[:, num_virtual:].long()}

    def attending(self, model: PreTrainedModel) -> AbstractContextManager[None]:  # noqa: ARG002 - as it attends anyway
        """Change nothing."""
        return nullcontext()
