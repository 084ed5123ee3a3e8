"""Sampling: the same as the reference implementation, whatever the batch, and from the right distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from pipeline_lib.models.sampling import Sample, SamplingSettings, sample
from tests.toy import byte_ids, chat, tiny_llama

PAD, END = 0, 2
BEGINNING = byte_ids("User: ")
PROMPTS = [
    byte_ids("a"), byte_ids("hello"), byte_ids("what is a tree?"), byte_ids("b"),
    *[BEGINNING + byte_ids(text) for text in ("hi", "and then?", "x")],
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(seed=4, sharpness=8.0)


def draw(
    model: PreTrainedModel, prompts: list[list[int]], *, seed: int = 5, copies: int = 1, **changes: float
) -> list[Sample]:
    settings = SamplingSettings.model_validate({"max_new_tokens": 24, "batch_size": 4} | changes)
    return sample(model, prompts, settings, eos_id=END, pad_id=PAD, seed=seed, samples_per_prompt=copies)


def favour(model: PreTrainedModel, token: int, logit: float) -> PreTrainedModel:
    """Give one token a fixed extra logit, whatever came before."""
    head = torch.nn.Linear(64, 259)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[token] = logit
    model.lm_head = head
    return model.eval()


def softmax_of(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double(), dim=-1)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_greedy_is_what_transformers_generates(model: PreTrainedModel, batch_size: int) -> None:
    found = draw(model, PROMPTS, temperature=0, batch_size=batch_size)
    for prompt, drawn in zip(PROMPTS, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=24, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
        assert list(drawn.ids) == expected[0, len(prompt) :].tolist()
    assert len({drawn.ids for drawn in found}) == len(PROMPTS), "the prompts should matter"


def test_samples_do_not_depend_on_the_batch_or_on_padding(model: PreTrainedModel) -> None:
    together = draw(model, PROMPTS, batch_size=7)
    for batch_size in (1, 2, 3):
        assert draw(model, PROMPTS, batch_size=batch_size) == together
    assert draw(model, PROMPTS[:1]) == together[:1]


def test_a_common_beginning_changes_nothing(model: PreTrainedModel) -> None:
    prompts = [BEGINNING * 3 + byte_ids(text) for text in ("a", "bcd", "ef", "")]
    assert draw(model, prompts, batch_size=4) == draw(model, prompts, batch_size=1)


def test_one_prompt_may_be_the_beginning_of_another_or_equal_to_it(model: PreTrainedModel) -> None:
    prompts = [byte_ids("ab"), byte_ids("abcd"), byte_ids("ab"), byte_ids("a")]
    assert draw(model, prompts, batch_size=4) == draw(model, prompts, batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_several_samples_of_a_prompt_are_those_of_the_prompt_repeated(model: PreTrainedModel, batch_size: int) -> None:
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    found = draw(model, PROMPTS, copies=3, batch_size=batch_size)
    assert found == draw(model, repeated)
    assert len({drawn.ids for drawn in found}) == len(repeated)


def test_a_prompt_is_computed_once_for_all_its_samples(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = type(model).forward

    def counted(self: PreTrainedModel, *args: object, input_ids: torch.Tensor, **kwargs: object) -> object:
        rows.append(len(input_ids))
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    draw(model, PROMPTS[:2], copies=5, batch_size=10, max_new_tokens=2)
    assert rows == [2, 9]  # one of the ten ends at once


def test_the_seed_and_the_row_decide(model: PreTrainedModel) -> None:
    same = [byte_ids("hello")] * 3
    assert draw(model, same) == draw(model, same)
    assert len({drawn.ids for drawn in draw(model, same)}) == 3
    assert draw(model, same, seed=6) != draw(model, same, seed=5)


def test_a_sample_ends_with_its_end_token_or_at_the_limit() -> None:
    model = favour(tiny_llama(seed=4), END, 3.0)
    found = draw(model, [byte_ids(f"prompt {n}") for n in range(40)], max_new_tokens=12, batch_size=16)
    finished = [drawn for drawn in found if drawn.is_finished]
    cut = [drawn for drawn in found if not drawn.is_finished]
    assert finished
    assert cut
    assert all(drawn.ids[-1] == END and drawn.ids.count(END) == 1 for drawn in finished)
    assert all(END not in drawn.ids and len(drawn.ids) == 12 for drawn in cut)
    assert {len(drawn.ids) for drawn in finished} > {1}, "rows should end at different times"


def test_the_tokenizer_without_a_pad_token_pads_with_its_end() -> None:
    model = tiny_llama(seed=4, sharpness=8.0)
    settings = SamplingSettings(max_new_tokens=8, batch_size=7)
    one = sample(model, PROMPTS, settings, eos_id=END, pad_id=END, seed=1)
    other = sample(model, PROMPTS, settings, eos_id=END, pad_id=PAD, seed=1)
    assert one == other


def test_one_step_has_the_models_distribution() -> None:
    model = tiny_llama(seed=4, sharpness=14.0)
    prompt, num = byte_ids("tell me"), 4000
    drawn = draw(model, [prompt] * num, max_new_tokens=1, batch_size=1000, seed=9)
    count = Counter(row.ids[0] for row in drawn)
    expected_V = softmax_of(model, prompt) * num
    large = [token for token in range(259) if expected_V[token] >= 10]
    observed = [float(count[token]) for token in large]
    expected = expected_V[large].tolist()
    observed.append(num - sum(observed))
    expected.append(num - sum(expected))
    assert len(large) >= 20
    squares = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    # Chi-square: mean = degrees of freedom, variance = twice that; four deviations with a fixed seed.
    degrees = len(large)
    assert abs(squares - degrees) < 4 * (2 * degrees) ** 0.5


def test_temperature_divides_the_logits() -> None:
    model = tiny_llama(seed=4, sharpness=14.0)
    prompt, num = byte_ids("tell me"), 4000
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt])).logits[0, -1].double()
    expected_V = torch.softmax(logits_V / 0.5, dim=-1)
    best = int(expected_V.argmax())
    drawn = draw(model, [prompt] * num, max_new_tokens=1, temperature=0.5, batch_size=1000)
    share = sum(row.ids[0] == best for row in drawn) / num
    spread = float((expected_V[best] * (1 - expected_V[best]) / num).sqrt())
    assert share == pytest.approx(float(expected_V[best]), abs=4 * spread)
    assert abs(share - float(softmax_of(model, prompt)[best])) > 4 * spread


def test_top_p_draws_from_the_smallest_set_that_is_large_enough() -> None:
    model = tiny_llama(seed=4, sharpness=14.0)
    prompt = byte_ids("tell me")
    probability_V, order_V = softmax_of(model, prompt).sort(descending=True)
    size = int((probability_V.cumsum(0) < 0.3).sum()) + 1
    assert 2 <= size <= 200
    drawn = draw(model, [prompt] * 3000, max_new_tokens=1, top_p=0.3, batch_size=1000)
    assert {row.ids[0] for row in drawn} == set(order_V[:size].tolist())


def test_a_tiny_top_p_is_greedy(model: PreTrainedModel) -> None:
    assert draw(model, PROMPTS, top_p=1e-9) == draw(model, PROMPTS, temperature=0)


def test_progress_is_told_after_every_batch(model: PreTrainedModel) -> None:
    done: list[int] = []
    settings = SamplingSettings(max_new_tokens=2, batch_size=3)
    sample(model, PROMPTS, settings, eos_id=END, pad_id=PAD, seed=0, on_batch=done.append)
    assert done == [3, 6, 7]


def test_the_prompts_here_hold_no_control_tokens() -> None:
    assert all(chat().eos_id not in prompt for prompt in PROMPTS)
