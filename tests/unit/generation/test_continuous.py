"""Continuous batches: the samples of plain batches, whatever the slots, in fewer and shorter rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.generation.prefill import group_size
from pipeline_lib.generation.prompt_slots import CopiedPrompts
from pipeline_lib.generation.shared_prompts import SharedPrompts
from pipeline_lib.generation.slot_trial import slots_of
from pipeline_lib.generation.slots import GROWN_BY
from pipeline_lib.models.sampling import Sample, SamplingSettings, sample
from pipeline_lib.models.virtual_tokens import fresh_tokens
from tests.toy import byte_ids, tiny_llama
from tests.unit.generation.tiny_models import ARCHITECTURES, tiny

PAD, END = 0, 2
BEGINNING = byte_ids("User: ")
PROMPTS = [
    byte_ids("a"), byte_ids("hello"), byte_ids("what is a tree?"), byte_ids("b"),
    *[BEGINNING + byte_ids(text) for text in ("hi", "and then?", "x")],
]  # fmt: skip


def ending(model: PreTrainedModel, logit: float) -> PreTrainedModel:
    """Let a model end its turns now and then."""
    old = model.get_output_embeddings()
    head = torch.nn.Linear(old.weight.shape[1], old.weight.shape[0], dtype=old.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()
        head.bias[END] = logit
    model.lm_head = head
    return model.eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return ending(tiny_llama(seed=4, sharpness=8.0), 4.0)


def continuous(model: PreTrainedModel) -> Generator:
    policy = Policy(Path("nowhere"), lambda: model)
    return open_generator({"name": "continuous"}, policy, eos_id=END, pad_id=PAD)


def draw(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    seed: int = 5,
    copies: int = 1,
    **changes: Any,
) -> list[Sample]:
    settings = SamplingSettings.model_validate({"max_new_tokens": 24, "batch_size": 4} | changes)
    return continuous(model).generate(prompts, settings, seed=seed, samples_per_prompt=copies)


def in_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    seed: int = 5,
    copies: int = 1,
    **changes: Any,
) -> list[Sample]:
    settings = SamplingSettings.model_validate({"max_new_tokens": 24, "batch_size": 4} | changes)
    return sample(model, prompts, settings, eos_id=END, pad_id=PAD, seed=seed, samples_per_prompt=copies)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_answers_as_in_batches(kind: str) -> None:
    found = tiny(kind)
    assert slots_of(found, longest=64) is SharedPrompts
    expected = in_batches(found, batch_size=1)
    assert draw(found, batch_size=3) == expected
    assert len({one.ids for one in expected}) == len(PROMPTS), "the prompts should matter"


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 100])
def test_samples_do_not_depend_on_the_slots(model: PreTrainedModel, slots: int) -> None:
    expected = in_batches(model, copies=3)
    assert {len(one.ids) for one in expected} > {1, 24}, "responses should be of uneven lengths"
    assert draw(model, copies=3, batch_size=slots) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.8}, {"min_new_tokens": 9}, {"stops_at_eos": False},
        {"max_new_tokens": 1}, {"max_new_tokens": GROWN_BY + 40, "stops_at_eos": False},
    ],
)  # fmt: skip
def test_every_setting_means_what_it_means_in_batches(model: PreTrainedModel, changes: dict[str, Any]) -> None:
    assert draw(model, copies=2, **changes) == in_batches(model, copies=2, **changes)


def test_equal_prompts_and_one_that_begins_another(model: PreTrainedModel) -> None:
    prompts = [byte_ids("ab"), byte_ids("abcd"), byte_ids("ab"), byte_ids("a")]
    assert draw(model, prompts) == in_batches(model, prompts)
    assert draw(model, []) == []


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_stand_before_every_prompt(kind: Any) -> None:
    found = ending(tiny_llama(seed=4, sharpness=8.0), 4.0)
    plain = draw(found)
    fresh_tokens(found, kind, byte_ids("Be brief. ")).attach(found)
    assert slots_of(found, longest=64) is SharedPrompts
    drawn = draw(found, copies=2, batch_size=3)
    assert drawn == in_batches(found, copies=2)
    assert drawn[::2] != plain


def test_a_model_in_bf16_is_tried_out_too() -> None:
    assert slots_of(tiny("llama", dtype=torch.bfloat16), longest=64) is SharedPrompts


def test_windows_that_hide_something_are_sampled_in_batches(caplog: pytest.LogCaptureFixture) -> None:
    found = tiny("mistral")
    assert slots_of(found, longest=12) is None
    assert slots_of(found, longest=11) is SharedPrompts
    assert draw(found) == in_batches(found, batch_size=1)


def test_a_model_whose_attention_is_its_own_copies_its_prompts(caplog: pytest.LogCaptureFixture) -> None:
    found = tiny("mpt")
    found.config.note = "not tried out yet"  # verdicts are kept by configuration
    assert slots_of(found, longest=64) is CopiedPrompts
    assert ["once for each of its samples" in record.message for record in caplog.records] == [True]
    assert draw(found, PROMPTS[:3], copies=2) == in_batches(found, PROMPTS[:3], batch_size=1, copies=2)


def test_a_model_that_goes_by_the_row_instead_of_positions_is_sampled_in_batches() -> None:
    found = tiny("gpt2")

    def without_positions(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"position_ids": None}

    found.base_model.register_forward_pre_hook(without_positions, with_kwargs=True)
    found.config.n_ctx_note = "another architecture"  # verdicts are kept by configuration
    assert slots_of(found, longest=64) is None
    assert draw(found, batch_size=1) == in_batches(found, batch_size=1)


def rows_of_forwards(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and columns of every forward of the backbone from here on."""
    shapes: list[tuple[int, int]] = []
    backbone = type(model.base_model)
    forward = backbone.forward

    def counted(self: Any, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(backbone, "forward", counted)
    return shapes


def test_a_row_that_ends_makes_room_for_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ending(tiny_llama(seed=4, sharpness=8.0), 5.5)
    prompts = [byte_ids(f"prompt {number:02d}") for number in range(40)]
    assert slots_of(found, longest=64) is not None
    expected = in_batches(found, prompts, batch_size=8)
    shapes = rows_of_forwards(found, monkeypatch)
    in_batches(found, prompts, batch_size=8)
    steps_in_batches = sum(width == 1 for _, width in shapes)
    shapes.clear()
    assert draw(found, prompts, batch_size=8) == expected
    steps = [rows for rows, width in shapes if width == 1]
    assert len(steps) < 0.8 * steps_in_batches
    assert max(steps) == 8
    # A first token comes from the prompt's own forward, every other from a row of a step.
    assert sum(steps) == sum(len(one.ids) - 1 for one in expected)


def test_a_prompt_is_computed_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tiny_llama(seed=4, sharpness=8.0)
    assert slots_of(found, longest=64) is not None
    shapes = rows_of_forwards(found, monkeypatch)
    prompts = [BEGINNING + byte_ids("one"), BEGINNING + byte_ids("two")]
    draw(found, prompts, copies=5, batch_size=4, max_new_tokens=2, stops_at_eos=False)
    # What both begin with, then each prompt's own tokens (five samples do not fit four slots), then the steps.
    assert [shape for shape in shapes if shape[1] > 1] == [(1, len(BEGINNING)), (1, 3), (1, 3)]
    assert sum(rows for rows, width in shapes if width == 1) == 10


def test_progress_is_told_prompt_by_prompt_and_can_end_the_sampling(model: PreTrainedModel) -> None:
    told: list[int] = []
    settings = SamplingSettings(max_new_tokens=24, batch_size=2)
    continuous(model).generate(PROMPTS, settings, seed=5, samples_per_prompt=2, on_batch=told.append)
    assert told == sorted(set(told))
    assert told[-1] == len(PROMPTS)
    assert len(told) >= 3

    class AskedToEndError(Exception):
        pass

    def stop(done: int) -> None:
        raise AskedToEndError

    with pytest.raises(AskedToEndError):
        continuous(model).generate(PROMPTS, settings, seed=5, on_batch=stop)


def test_prompts_of_like_lengths_run_together() -> None:
    assert group_size([5]) == 1
    assert group_size([10] * 20) == 20
    assert group_size([1, 60]) == 2  # 59 tokens of padding are always allowed
    assert group_size([1, 2, 90]) == 2
    assert group_size([700, 720, 800, 2000]) == 3  # 180 of 2220 tokens
    assert group_size([3000, 3000]) == 1  # more than one forward holds
    assert group_size([9000, 9000]) == 1
