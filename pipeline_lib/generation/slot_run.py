"""One run of sampling in slots: prompts wait, are answered side by side, and make room.

Legend: B rows in use, T columns, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.generation.prefill import Prefiller, group_size
from pipeline_lib.generation.prompt_slots import PromptSlots
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.fused_lora import summed_weights
from pipeline_lib.models.logprobs import logits_of
from pipeline_lib.models.sampling import Sample, SamplingSettings, common_prefix, draw_tokens

_REFILLED_SHARE = 8
"""Slots are filled again once one in so many is free: prompts run better together."""


@dataclass
class Row:
    """A sample that is being written."""

    place: int
    """Its index among all samples."""
    noise: torch.Generator
    columns: int
    """Columns of its slot that are filled: all of its tokens but the last."""
    num_virtual: int
    ids: list[int] = field(default_factory=list)


@dataclass
class _Ready:
    """A prompt that has been run, with samples that have not begun."""

    index: int
    logits_V: Tensor
    columns: int
    num_virtual: int
    places: deque[int]


class SlotRun:
    """Samples for some prompts from one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        slots: type[PromptSlots],
        eos_id: int,
        pad_id: int,
        seed: int,
        samples_per_prompt: int,
        on_batch: Callable[[int], None] | None,
    ) -> None:
        """Take what `Generator.generate` is given, the model, and how it keeps keys and values."""
        self.model, self.prompts, self.settings = model, prompts, settings
        self.eos_id, self.pad_id, self.seed, self.on_batch = eos_id, pad_id, seed, on_batch
        self.copies = samples_per_prompt
        self._shared = common_prefix([list(prompt) for prompt in prompts])
        self._waiting = deque(sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index)))
        self._ready: deque[_Ready] = deque()
        self._rows: list[Row] = []
        self._num_slots = min(settings.batch_size, len(prompts) * samples_per_prompt)
        self._slots = slots(self._num_slots)
        self._found: dict[int, Sample] = {}
        self._left = [samples_per_prompt] * len(prompts)
        self._num_done = 0

    @torch.inference_mode()
    def samples(self) -> list[Sample]:
        """Sample until every response has ended; see `Generator.generate`."""
        with summed_weights(self.model):
            prefiller = Prefiller(self.model, self.prompts[0][: self._shared], pad_id=self.pad_id)
            while self._rows or self._ready or self._waiting:
                done_before = self._num_done
                free = self._num_slots - len(self._rows)
                if not self._rows or free * _REFILLED_SHARE >= self._num_slots:
                    self._fill(prefiller)
                if self._rows:
                    self._step()
                if self.on_batch is not None and self._num_done > done_before:
                    self.on_batch(self._num_done)
        return [self._found[place] for place in range(len(self.prompts) * self.copies)]

    def _fill(self, prefiller: Prefiller) -> None:
        """Begin samples until no slot is free or none waits."""
        while (free := self._num_slots - len(self._rows)) and (self._ready or self._waiting):
            if not self._ready:
                self._prefill(prefiller, limit=-(-free // self.copies))
            self._begin(free)

    def _prefill(self, prefiller: Prefiller, *, limit: int) -> None:
        """Run the next prompts, as many as go well together."""
        next_up = list(self._waiting)[:limit]
        size = group_size([len(self.prompts[index]) - self._shared for index in next_up])
        indices = [self._waiting.popleft() for _ in range(size)]
        for index, prompt in zip(indices, prefiller.run([self.prompts[index] for index in indices]), strict=True):
            self._slots.hold(index, prompt.states)
            columns = int(prompt.states[0][0].shape[1])
            places = deque(range(index * self.copies, (index + 1) * self.copies))
            self._ready.append(_Ready(index, prompt.logits_V, columns, prompt.num_virtual, places))

    def _begin(self, free: int) -> None:
        """Draw the first tokens of the next samples and give those that go on a slot."""
        begun: list[tuple[Row, _Ready]] = []
        while self._ready and len(begun) < free:
            ready = self._ready[0]
            place = ready.places.popleft()
            noise = torch.Generator().manual_seed(derive_seed(self.seed, "sample", place))
            begun.append((Row(place, noise, ready.columns, ready.num_virtual), ready))
            if not ready.places:
                self._ready.popleft()
        logits_BV = torch.stack([ready.logits_V for _, ready in begun])
        for (row, ready), token in zip(begun, self._draw(logits_BV, [row for row, _ in begun]), strict=True):
            if self._goes_on(row, token):
                self._slots.begin(len(self._rows), ready.index)
                self._rows.append(row)
            if row.place == (ready.index + 1) * self.copies - 1:
                self._slots.let_go(ready.index)

    def _step(self) -> None:
        """Write one token more of every row; the last rows move to where others have ended."""
        logits_BV = next_logits(self.model, self._slots, self._rows)
        tokens = self._draw(logits_BV, self._rows)
        goes_on = [self._goes_on(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        for slot in reversed([slot for slot, stays in enumerate(goes_on) if not stays]):
            last = self._rows.pop()
            self._slots.vacate(slot, last=len(self._rows), length=last.columns)
            if slot < len(self._rows):
                self._rows[slot] = last

    def _draw(self, logits_BV: Tensor, rows: Sequence[Row]) -> list[int]:
        too_short = [place for place, row in enumerate(rows) if len(row.ids) < self.settings.min_new_tokens]
        if too_short:
            logits_BV[too_short, self.eos_id] = -torch.inf
        return draw_tokens(logits_BV, self.settings, [row.noise for row in rows])

    def _goes_on(self, row: Row, token: int) -> bool:
        """Add a token; keep the sample and return False where it was the last."""
        row.ids.append(token)
        is_end = token == self.eos_id and self.settings.stops_at_eos
        if not is_end and len(row.ids) < self.settings.max_new_tokens:
            return True
        self._found[row.place] = Sample(tuple(row.ids), self.eos_id in row.ids)
        index = row.place // self.copies
        self._left[index] -= 1
        self._num_done += self._left[index] == 0
        return False


def next_logits(model: PreTrainedModel, slots: PromptSlots, rows: Sequence[Row]) -> Tensor:
    """Feed each row's last token; return the logits of its next, `(B, V)` float32 on the CPU.

    The rows are those of the first slots.
    """
    num_virtual = rows[0].num_virtual
    inputs = slots.inputs([row.columns for row in rows], num_virtual=num_virtual)
    input_B1 = torch.tensor([[row.ids[-1]] for row in rows], device=model.device)
    position_B1 = torch.tensor([[row.columns - num_virtual] for row in rows], device=model.device)
    with slots.attending(model):
        backbone: nn.Module = model.base_model
        output = backbone(input_ids=input_B1, position_ids=position_B1, use_cache=True, **inputs)
    for row in rows:
        row.columns += 1
    return logits_of(model, output.last_hidden_state)[:, -1].float().cpu()
