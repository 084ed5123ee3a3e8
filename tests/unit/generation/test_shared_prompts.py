"""Prompts that are kept once: the logits and samples of copies, less memory, nothing kept too long."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.generation.prefill import Prefiller
from pipeline_lib.generation.prompt_slots import CopiedPrompts, PromptSlots
from pipeline_lib.generation.shared_attention import SharedStep, attention_to_both
from pipeline_lib.generation.shared_prompts import SharedPrompts
from pipeline_lib.generation.slot_run import Row, SlotRun, next_logits
from pipeline_lib.generation.slots import SlotCache
from pipeline_lib.models.sampling import Sample, SamplingSettings
from pipeline_lib.models.trees import supports_trees
from tests.toy import byte_ids
from tests.unit.generation.tiny_models import ARCHITECTURES, tiny

KINDS: tuple[type[PromptSlots], ...] = (CopiedPrompts, SharedPrompts)
PROMPTS = [byte_ids("a"), byte_ids("hello there"), byte_ids("what is a tree?")]


def begun(model: PreTrainedModel, slots: PromptSlots, prompt_of_row: list[int]) -> list[Row]:
    """Rows behind prompts, none of them with a token yet."""
    for index, prompt in enumerate(Prefiller(model, [], pad_id=0).run(PROMPTS)):
        slots.hold(index, prompt.states)
    rows = []
    for slot, index in enumerate(prompt_of_row):
        slots.begin(slot, index)
        rows.append(Row(slot, torch.Generator(), len(PROMPTS[index]), 0))
    return rows


def written(model: PreTrainedModel, slots: PromptSlots, rows: list[Row], texts: list[str]) -> list[Tensor]:
    """The logits of every step, while each row is given its text."""
    logits = []
    for tokens in zip(*map(byte_ids, texts), strict=True):
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
        logits.append(next_logits(model, slots, rows))
    return logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.inference_mode()
def test_logits_are_those_of_copies(kind: str) -> None:
    model = tiny(kind)
    prompt_of_row, texts = [2, 0, 2, 1, 0, 2], ["first", "first", "third", "fourt", "fifth", "sixth"]
    found = []
    for slots in (one(6) for one in KINDS):
        rows = begun(model, slots, prompt_of_row)
        before = written(model, slots, rows, texts)
        # The rows of slots 4 and 1 end, the last of prompt 0: the last rows take their places.
        slots.let_go(0)
        for slot in (4, 1):
            last = rows.pop()
            slots.vacate(slot, last=len(rows), length=last.columns)
            rows[slot] = last
        found.append(torch.cat(before + written(model, slots, rows, ["and", "so ", "on ", "..."])))
    copied, shared = (torch.log_softmax(logits.double(), dim=-1) for logits in found)
    assert float((copied[24] - copied[25]).abs().max()) > 0.01, "the prompt should matter behind the same text"
    assert float((copied - shared).abs().max()) < 1e-5


def samples(model: PreTrainedModel, kind: type[PromptSlots], **changes: Any) -> tuple[list[Sample], Any]:
    settings = SamplingSettings.model_validate({"max_new_tokens": 12, "batch_size": 6} | changes)
    run = SlotRun(model, PROMPTS, settings, slots=kind, eos_id=2, pad_id=0, seed=3, samples_per_prompt=5, on_batch=None)
    return run.samples(), run._slots


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("slots", [1, 4, 6, 15])
def test_samples_are_those_of_copies_and_nothing_stays(kind: str, slots: int) -> None:
    model = tiny(kind)
    expected, _ = samples(model, CopiedPrompts, batch_size=slots)
    found, kept = samples(model, SharedPrompts, batch_size=slots)
    assert found == expected
    assert kept._prompts == []
    assert kept._columns == {}
    assert kept._prompt_of == []


def test_a_model_with_attention_for_trees_keeps_it() -> None:
    model = tiny("llama")
    expected, _ = samples(model, SharedPrompts)
    assert supports_trees(model)
    before = model.config._attn_implementation
    assert samples(model, SharedPrompts)[0] == expected
    assert model.config._attn_implementation == before


def test_eight_samples_need_an_eighth_of_the_prompts_memory() -> None:
    num_columns, num_rows = 256, 16
    states = [(torch.zeros(2, num_columns, 8), torch.zeros(2, num_columns, 8))]
    copied, shared = CopiedPrompts(num_rows), SharedPrompts(num_rows)
    slots: PromptSlots
    for slots in (copied, shared):
        for prompt in range(2):
            slots.hold(prompt, states)
            for row in range(8):
                slots.begin(8 * prompt + row, prompt)
            slots.let_go(prompt)
    of_prompts = num_numbers(copied._rows)
    assert of_prompts == 16 * 2 * 2 * (num_columns + 64) * 8  # and 64 columns of responses
    assert num_numbers(shared._kept) == 4 * 2 * 2 * (num_columns + 64) * 8  # room for four prompts at once
    assert num_numbers(shared._rows) == 16 * 2 * 2 * 64 * 8


def num_numbers(cache: SlotCache) -> int:
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache._layers)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_columns_that_are_not_seen_may_hold_anything(kind: type[PromptSlots]) -> None:
    model = tiny("llama", dtype=torch.float64)
    logits = []
    for rubbish in (0.0, 1e30):
        slots = kind(3)
        rows = begun(model, slots, [1, 0, 0])
        written(model, slots, rows, ["b", "c", "d"])
        for cache, seen in caches_of(slots):
            for layer in cache._layers:
                for row, columns in enumerate(seen):
                    layer.keys[row, :, columns:] = rubbish
                    layer.values[row, :, columns:] = rubbish
        logits += written(model, slots, rows, ["e", "f", "g"])
    assert torch.equal(logits[0], logits[1])


def caches_of(slots: Any) -> list[tuple[SlotCache, list[int]]]:
    """The caches, and how many columns count in each slot."""
    if isinstance(slots, CopiedPrompts):
        return [(slots._rows, [len(PROMPTS[prompt]) + 1 for prompt in (1, 0, 0)])]
    return [(slots._rows, [1, 1, 1]), (slots._kept, [len(prompt) for prompt in PROMPTS])]


def test_attention_to_both_by_hand() -> None:
    """One head of width 1, scores = keys: weights 1, 2 | 3 and 1, 2 | 4 for values 6, 12 | 18 and 6, 12 | 21."""
    key, value = torch.tensor([0.0, math.log(2)]), torch.tensor([6.0, 12.0])
    step = SharedStep(
        [(key.view(1, 1, 2, 1), value.view(1, 1, 2, 1))], None, None, torch.tensor([[1, 0]]), torch.tensor([1, 0])
    )
    layer = nn.Identity()
    layer.layer_idx = 0  # type: ignore[assignment]  # a number, as transformers' layers have
    own_key = torch.tensor([math.log(3), math.log(4)]).view(2, 1, 1, 1)
    own_value = torch.tensor([18.0, 21.0]).view(2, 1, 1, 1)
    output, _ = attention_to_both(
        layer, torch.ones(2, 1, 1, 1), own_key, own_value, None, shared_prompts=step, scaling=1.0
    )
    assert output.flatten().tolist() == pytest.approx([(6 + 24 + 54) / 6, (6 + 24 + 84) / 7])
    with pytest.raises(NotImplementedError, match="has no s_aux"):
        attention_to_both(
            layer, torch.ones(2, 1, 1, 1), own_key, own_value, None, shared_prompts=step, s_aux=torch.zeros(1)
        )
