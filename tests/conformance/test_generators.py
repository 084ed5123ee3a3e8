"""What every generator must do, over the whole table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.generation import GENERATORS, open_generator
from pipeline_lib.generation.contract import Generator, GeneratorSettings, Policy
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.sampling import SamplingSettings
from tests.toy import byte_ids
from tests.unit.generation.fake_vllm import install
from tests.unit.generation.tiny_models import write_sharp_model

every_generator = pytest.mark.parametrize("name", list(GENERATORS))

PAD, END = 0, 2
PROMPTS = [byte_ids(text) for text in ("a", "what is it?", "and then", "b", "what?")]
CHOSEN = SamplingSettings(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharp_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    return load_causal_model(directory, dtype=torch.float32)


@pytest.fixture
def build(directory: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Generator]:
    """Return what opens a generator of a name on a tiny model that is trained as a whole."""
    install(monkeypatch)
    policy = Policy(directory, lambda: model, is_trained=True)
    return lambda name: open_generator({"name": name}, policy, eos_id=END, pad_id=PAD)


@every_generator
def test_contract(name: str) -> None:
    settings = GENERATORS.build({"name": name})
    assert isinstance(settings, BaseModel)
    assert isinstance(settings, GeneratorSettings)
    assert type(settings).model_config["frozen"] is True
    assert name == type(settings).__module__.rpartition(".")[2]
    assert name == type(settings).__name__.lower()
    assert "name" not in type(settings).model_fields
    for field_name, field in type(settings).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
    assert type(settings).model_validate(settings.model_dump(mode="json")) == settings
    with pytest.raises(ConfigError, match="unknown key 'parameter_that_is_not_there'"):
        GENERATORS.build({"name": name, "parameter_that_is_not_there": 1})


@every_generator
def test_a_sample_is_a_function_of_seed_index_and_prompt(name: str, build: Any) -> None:
    generator = build(name)
    first = generator.generate(PROMPTS, CHOSEN, seed=1, samples_per_prompt=2)
    assert len(first) == 2 * len(PROMPTS)
    assert len({one.ids for one in first}) == len(first)
    assert generator.generate(PROMPTS, CHOSEN, seed=1, samples_per_prompt=2) == first
    assert generator.generate(PROMPTS, CHOSEN, seed=2, samples_per_prompt=2) != first
    assert generator.generate(PROMPTS[:2], CHOSEN, seed=1, samples_per_prompt=2) == first[:4]
    alone = CHOSEN.model_copy(update={"batch_size": 1})
    assert [one.ids for one in generator.generate(PROMPTS, alone, seed=1, samples_per_prompt=2)] == [
        one.ids for one in first
    ]


@every_generator
def test_the_most_likely_response_is_the_same_from_all(name: str, build: Any, model: PreTrainedModel) -> None:
    greedy = CHOSEN.model_copy(update={"temperature": 0.0})
    for prompt, one in zip(PROMPTS, build(name).generate(PROMPTS, greedy, seed=1), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=6, eos_token_id=END, pad_token_id=PAD,
        )  # fmt: skip
        assert list(one.ids) == expected[0, len(prompt) :].tolist()


@every_generator
def test_it_speaks_with_the_weights_that_it_was_given_last(
    name: str, build: Any, directory: Path, model: PreTrainedModel
) -> None:
    generator = build(name)
    before = generator.generate(PROMPTS, CHOSEN, seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.05)
    generator.update(Policy(directory, lambda: model, is_trained=True))
    after = generator.generate(PROMPTS, CHOSEN, seed=1)
    assert [one.ids for one in after] != [one.ids for one in before]


@every_generator
def test_progress_is_told_and_can_end_it(name: str, build: Any) -> None:
    told: list[int] = []
    build(name).generate(PROMPTS, CHOSEN, seed=1, on_batch=told.append)
    assert told == sorted(told)
    assert told[-1] == len(PROMPTS)

    class AskedToEndError(Exception):
        pass

    def stop(_: int) -> None:
        raise AskedToEndError

    with pytest.raises(AskedToEndError):
        build(name).generate(PROMPTS, CHOSEN, seed=1, on_batch=stop)


@every_generator
def test_without_prompts_there_are_no_samples(name: str, build: Any) -> None:
    assert build(name).generate([], CHOSEN, seed=1) == []
