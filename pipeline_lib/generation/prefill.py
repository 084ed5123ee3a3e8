"""Prompts run through a model before they are answered: in groups of like lengths, what they share once.

Legend: G prompts of a group, T columns, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pipeline_lib.generation.slots import LayerStates
from pipeline_lib.models.logprobs import logits_of

_MAX_TOKENS = 4096
"""Tokens of one forward, at most, unless one prompt alone has more."""
_PADDING_FREE = 64
"""Tokens of padding in a group that are always allowed."""
_PADDING_SHARE = 8
"""Else a group's padding is at most one part in so many of its tokens."""


@dataclass(frozen=True)
class Prefilled:
    """A prompt that is ready to be answered."""

    logits_V: Tensor
    """Of the first token, float32 on the CPU."""
    states: tuple[LayerStates, ...]
    """Keys and values of every layer, `(H, T, W)`; virtual tokens stand before the prompt."""
    num_virtual: int
    """Virtual tokens in front of it."""


class Prefiller:
    """Runs prompts that begin with the same tokens."""

    def __init__(self, model: PreTrainedModel, shared_ids: Sequence[int], *, pad_id: int) -> None:
        """Compute what all prompts begin with.

        Args:
            model: In evaluation mode.
            shared_ids: Tokens that every prompt begins with; each has more.
            pad_id: Token that fills rows up on the right, where nothing before it sees it.
        """
        self.model, self.shared, self.pad_id = model, len(shared_ids), pad_id
        self._prefix: list[LayerStates] = []
        if shared_ids:
            cache = DynamicCache(config=model.config)
            self._run(torch.tensor([list(shared_ids)], device=model.device), cache, first_position=0)
            self._prefix = [(layer.keys, layer.values) for layer in cache.layers]

    def run(self, prompts: Sequence[Sequence[int]]) -> list[Prefilled]:
        """Run whole prompts, of which the shared beginning is not computed again."""
        own = [list(prompt[self.shared :]) for prompt in prompts]
        width, device = max(map(len, own)), self.model.device
        cache = DynamicCache(config=self.model.config)
        for index, (key, value) in enumerate(self._prefix):
            cache.update(key.expand(len(own), -1, -1, -1), value.expand(len(own), -1, -1, -1), index)
        # Padding is on the right: causal attention hides it, without any mask.
        input_GT = torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids in own], device=device)
        hidden_GTD = self._run(input_GT, cache, first_position=self.shared)
        last_GD = hidden_GTD[torch.arange(len(own), device=device), torch.tensor([len(ids) - 1 for ids in own])]
        logits_GV = logits_of(self.model, last_GD).float().cpu()
        num_virtual = int(cache.layers[0].keys.shape[2]) - self.shared - width
        found = []
        for row, ids in enumerate(own):
            columns = num_virtual + self.shared + len(ids)
            states = tuple((layer.keys[row, :, :columns], layer.values[row, :, :columns]) for layer in cache.layers)
            found.append(Prefilled(logits_GV[row], states, num_virtual))
        return found

    def _run(self, input_GT: Tensor, cache: DynamicCache, *, first_position: int) -> Tensor:
        backbone: nn.Module = self.model.base_model
        positions_T = torch.arange(first_position, first_position + input_GT.shape[1], device=input_GT.device)
        output = backbone(
            input_ids=input_GT, position_ids=positions_T.expand(len(input_GT), -1), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        hidden: Tensor = output.last_hidden_state
        return hidden


def group_size(lengths: Sequence[int]) -> int:
    """Return how many of the first prompts run together.

    Args:
        lengths: Tokens of each prompt that are to be computed, ascending.
    """
    total = 0
    for count, length in enumerate(lengths):
        padding = (count + 1) * length - (total + length)
        is_too_uneven = padding > max(_PADDING_FREE, (total + length) // _PADDING_SHARE)
        if count and (is_too_uneven or (count + 1) * length > _MAX_TOKENS):
            return count
        total += length
    return len(lengths)
