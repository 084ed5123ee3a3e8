"""What is handed to the model registry: a prompt-tuned model as a plain one, a prefix-tuned one not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline_lib.errors import ConfigError, IntegrityError
from pipeline_lib.models.base import load_causal_model, save_model
from pipeline_lib.models.publish import log_and_verify
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.models.virtual_tokens import Kind, fresh_tokens
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder
from tests.toy import byte_ids, dialogue, sharpen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in storage."""
    write_tiny_model(tmp_path / "base", seed=0)
    return tmp_path / "base"


def tuned(folder: Path, kind: Kind) -> Path:
    """The model with trained tokens, saved."""
    model = load_causal_model(folder, dtype=torch.float32)
    sharpen(model, 3.0)
    tokens = fresh_tokens(model, kind, byte_ids("hello")).attach(model)
    with torch.no_grad():
        tokens.values.mul_(1.5)
    out = folder.parent / kind
    save_model(model, out, dtype=torch.float32, tokenizer_from=folder)
    return out


class Registry:
    """Saves and loads as `mlflow.transformers` does: plain files, plain classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log_model(self, parts: dict[str, Any], **_: Any) -> SimpleNamespace:
        for part in parts.values():
            part.save_pretrained(self.folder)
        return SimpleNamespace(model_uri=str(self.folder))

    def load_model(self, uri: str, *, return_type: str) -> dict[str, Any]:
        assert return_type == "components"
        return {"model": AutoModelForCausalLM.from_pretrained(uri), "tokenizer": AutoTokenizer.from_pretrained(uri)}


def test_other_software_answers_as_the_trained_model_does(folder: Path, tmp_path: Path) -> None:
    directory = tuned(folder, "prompt")
    registry = Registry(tmp_path / "registry")
    uri = log_and_verify(directory, registry.log_model, registry.load_model)
    served = registry.load_model(uri, return_type="components")
    messages = dialogue("what is a tree?")
    text = served["tokenizer"].apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|virtual_0|><|virtual_1|>")
    ids = served["tokenizer"](text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    found = served["model"].generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()

    chat = ChatTokenizer.load(directory)
    prompt, _ = Encoder(chat, 256, 64).prompt(messages, where="here")
    assert ids.shape[1] == len(prompt) + 5
    greedy = SamplingSettings(max_new_tokens=12, temperature=0.0)
    model = load_causal_model(directory, dtype=torch.float32)
    [expected] = sample(model, [prompt], greedy, eos_id=chat.eos_id, pad_id=chat.pad_id, seed=0)
    assert found == list(expected.ids)


def test_the_new_tokens_are_never_generated(folder: Path, tmp_path: Path) -> None:
    directory = tuned(folder, "prompt")
    registry = Registry(tmp_path / "registry")
    log_and_verify(directory, registry.log_model, registry.load_model)
    model = AutoModelForCausalLM.from_pretrained(registry.folder)
    vocabulary = model.config.vocab_size - 5
    with torch.no_grad():  # make them the likeliest of all
        model.get_input_embeddings().weight[vocabulary:] = 100 * torch.ones(64)
    torch.manual_seed(0)
    found = model.generate(torch.tensor([byte_ids("hi")] * 4), do_sample=True, max_new_tokens=16)
    assert int(found.max()) < vocabulary


def test_the_artifact_itself_is_not_changed(folder: Path, tmp_path: Path) -> None:
    directory = tuned(folder, "prompt")
    before = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    registry = Registry(tmp_path / "registry")
    log_and_verify(directory, registry.log_model, registry.load_model)
    assert {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()} == before


def test_a_plain_model_gets_no_new_tokens(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    log_and_verify(folder, registry.log_model, registry.load_model)
    assert AutoModelForCausalLM.from_pretrained(registry.folder).config.vocab_size == 259


def test_a_prefix_tuned_model_is_refused_before_anything_is_logged(folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    with pytest.raises(ConfigError, match="registry's transformers models cannot carry"):
        log_and_verify(tuned(folder, "prefix"), registry.log_model, registry.load_model)
    assert not registry.folder.exists()


@pytest.mark.parametrize("kind", ["plain", "prompt"])
def test_a_model_that_comes_back_changed_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    directory = folder if kind == "plain" else tuned(folder, "prompt")
    registry = Registry(tmp_path / "registry")

    def changed(uri: str, *, return_type: str) -> dict[str, Any]:
        parts = registry.load_model(uri, return_type=return_type)
        with torch.no_grad():
            parts["model"].get_input_embeddings().weight.add_(0.1)
        return parts

    load: Callable[..., Any] = changed
    with pytest.raises(IntegrityError, match="differs from"):
        log_and_verify(directory, registry.log_model, load)
