"""The keys and values of a prompt once for all its rows; each row keeps only its response's.

Legend: B rows in use, G prompts in use, K rows of a prompt, T columns of the prompts, R of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline_lib.generation.shared_attention import SharedStep, shared_attention
from pipeline_lib.generation.slots import LayerStates, SlotCache

_GROWN_BY = 4
"""Prompts that room is made for at once."""


class SharedPrompts:
    """Prompts that are kept once, and rows of responses; see `PromptSlots`."""

    def __init__(self, slots: int) -> None:
        """Take how many rows there may be at once."""
        self._rows = SlotCache(slots)
        self._kept = SlotCache(0)
        self._prompts: list[int] = []
        """The prompt of each slot of `_kept`."""
        self._columns: dict[int, int] = {}
        """How many each prompt has."""
        self._prompt_of: list[int] = []
        """The prompt of each row."""
        self._is_open: set[int] = set()
        """Prompts behind which rows may still begin."""
        self._who: tuple[Tensor, Tensor, Tensor | None] | None = None
        """What changes only with the rows: see `_table`."""

    def hold(self, prompt: int, states: Sequence[LayerStates]) -> None:
        """Keep a prompt for rows to come."""
        slot, columns = len(self._prompts), int(states[0][0].shape[1])
        self._kept.make_room(-(-(slot + 1) // _GROWN_BY) * _GROWN_BY - 1, columns + 1, like=states)
        self._kept.put(slot, states)
        self._rows.make_room(0, 1, like=states)
        self._prompts.append(prompt)
        self._columns[prompt] = columns
        self._is_open.add(prompt)
        self._who = None

    def begin(self, slot: int, prompt: int) -> None:
        """Begin a row behind a prompt; nothing is copied."""
        assert slot == len(self._prompt_of)
        self._prompt_of.append(prompt)
        self._who = None

    def let_go(self, prompt: int) -> None:
        """No more rows begin behind this prompt; it goes with its last row."""
        self._is_open.remove(prompt)
        self._forget_if_over(prompt)

    def vacate(self, slot: int, *, last: int, length: int) -> None:
        """Move the last row to where one has ended; its prompt stays where it is."""
        ended, moved = self._prompt_of[slot], self._prompt_of.pop()
        if slot < last:
            self._rows.move(last, slot, length=length - self._columns[moved])
            self._prompt_of[slot] = moved
        self._who = None
        self._forget_if_over(ended)

    def inputs(self, columns: Sequence[int], *, num_virtual: int) -> dict[str, Any]:  # noqa: ARG002 - prompts hold them
        """Return the rows' cache, and the prompts for the attention; see `PromptSlots`."""
        width = max(self._columns.values())
        own = [column - self._columns[prompt] for column, prompt in zip(columns, self._prompt_of, strict=True)]
        states, seen_BR = self._rows.at(own, before=width)
        if self._who is None:
            self._who = self._table(seen_BR.device)
        row_GK, place_B, hidden_G11T = self._who
        prompts = self._kept.first(len(self._prompts), width=width)
        # A mask of one element only says that there is none to make.
        placeholder = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=seen_BR.device)
        step = SharedStep(prompts, hidden_G11T, _hidden(seen_BR), row_GK, place_B)
        return {"past_key_values": states, "attention_mask": placeholder, "shared_prompts": step}

    def attending(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Let a model attend to prompts and rows."""
        return shared_attention(model)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the rows of each prompt, `(G, K)`, each row's place in it, and what ends before others do."""
        rows: dict[int, list[int]] = {prompt: [] for prompt in self._prompts}
        for row, prompt in enumerate(self._prompt_of):
            rows[prompt].append(row)
        copies = max(map(len, rows.values()))
        table = [of_prompt + [0] * (copies - len(of_prompt)) for of_prompt in rows.values()]
        places = [0] * len(self._prompt_of)
        for group, of_prompt in enumerate(rows.values()):
            for place, row in enumerate(of_prompt):
                places[row] = group * copies + place
        length_G1 = torch.tensor([[self._columns[prompt]] for prompt in self._prompts], device=device)
        seen_GT = torch.arange(max(self._columns.values()), device=device) < length_G1
        return torch.tensor(table, device=device), torch.tensor(places, device=device), _hidden(seen_GT)

    def _forget_if_over(self, prompt: int) -> None:
        """Give up a prompt that no row needs; the last prompt takes its place."""
        if prompt in self._is_open or prompt in self._prompt_of:
            return
        slot, last = self._prompts.index(prompt), len(self._prompts) - 1
        moved = self._prompts.pop()
        if slot < last:
            self._kept.move(last, slot, length=self._columns[moved])
            self._prompts[slot] = moved
        del self._columns[prompt]
        self._who = None


def _hidden(seen: Tensor) -> Tensor | None:
    """Return what is added to the scores, `(rows, 1, 1, columns)`; None where all is seen."""
    if bool(seen.all()):
        return None
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None, None]
