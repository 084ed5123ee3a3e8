"""Base models: the tiny one, folders and their refusals, and models that scale or cap their logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from pipeline_lib.errors import ModelNotFoundError
from pipeline_lib.hashing import sha256_file
from pipeline_lib.models.base import import_base_model, load_causal_model, stored_dtype
from pipeline_lib.models.logprobs import logit_cap, logit_scale
from pipeline_lib.models.tiny import byte_tokenizer, write_tiny_model
from pipeline_lib.text.chat_template import ChatTokenizer

SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5,
}  # fmt: skip


def bring(source: str, directory: Path, *, chat_template: str | None = None) -> None:
    directory.mkdir()
    import_base_model(source, directory, revision=None, chat_template=chat_template, seed=7)


def test_the_tiny_model_is_a_function_of_its_seed(tmp_path: Path) -> None:
    bring("tiny-random", tmp_path / "one")
    bring("tiny-random", tmp_path / "two")
    write_tiny_model(tmp_path / "other", seed=8)
    one, two, other = (sha256_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other"))
    assert one == two != other


def test_a_folder_is_copied_whole_and_its_template_replaced(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base", seed=1)
    bring(str(tmp_path / "base"), tmp_path / "same")
    bring(str(tmp_path / "base"), tmp_path / "other", chat_template="{{ 'hello' }}")
    first = load_causal_model(tmp_path / "base", dtype=torch.float32).state_dict()
    again = load_causal_model(tmp_path / "same", dtype=torch.float32).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert ChatTokenizer.load(tmp_path / "same").tokenizer.chat_template == byte_tokenizer().chat_template
    assert ChatTokenizer.load(tmp_path / "other").tokenizer.chat_template == "{{ 'hello' }}"


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "just-a-word", "a/b/c"])
def test_a_place_without_a_model_is_named(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no base model at") as caught:
        bring(source, tmp_path / "out")
    assert source in caught.value.cause


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="cannot load the base model"):
        bring(str(tmp_path / "empty"), tmp_path / "out")


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base", seed=1)
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="cannot load the base model"):
        bring(str(tmp_path / "base"), tmp_path / "out")


def test_the_storage_format_is_read_from_the_folder(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base", seed=1)
    assert stored_dtype(tmp_path / "base") is torch.float32


def test_a_model_that_caps_its_logits_loads(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert logit_cap(load_causal_model(tmp_path, dtype=torch.float32)) == 2.0


def test_a_model_that_scales_its_logits_loads(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, logits_scaling=8.0)).save_pretrained(tmp_path)
    assert logit_scale(load_causal_model(tmp_path, dtype=torch.float32)) == 1 / 8
