"""Adapters: nothing at first, off means the base, merged means the same; what is saved is a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pipeline_lib.errors import DivergedError
from pipeline_lib.hashing import sha256_file
from pipeline_lib.models.adapters import add_adapter, without_adapter
from pipeline_lib.models.base import TOKENIZER_FILES, load_causal_model
from pipeline_lib.models.heads import head_of, load_scalar_model
from pipeline_lib.models.merging import merge
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.training.trained_model import TrainedModel, prepare
from tests.toy import LORA, byte_ids, policy_of, reward_model_of, settings, tiny_llama

PROMPTS = [byte_ids(text) for text in ("a", "hello", "what is a tree?", "x" * 40, "one two three")]


def logits(model: PreTrainedModel) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits for prompt in PROMPTS]


def furthest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def disturb(trained: TrainedModel, *, size: float = 0.05) -> TrainedModel:
    """Stand in for training: give every trained weight another value."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trained.group("policy", learning_rate=1.0).parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return trained


def add_lora(model: PreTrainedModel, chosen: LoraSettings, *, seed: int) -> PeftModel:
    wrapper = add_adapter(model, chosen, seed=seed, encode=byte_ids)
    assert isinstance(wrapper, PeftModel)
    return wrapper


def gpt2() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_a_new_adapter_changes_nothing_and_trains_alone(make: type) -> None:
    model: PreTrainedModel = make()
    before = logits(model)
    add_lora(model, LORA, seed=1)
    assert furthest(logits(model), before) == 0.0
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


def test_every_linear_layer_of_the_backbone_is_adapted_and_no_head() -> None:
    model = tiny_llama()
    add_lora(model, LORA, seed=1)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.rsplit(".", 1)[1] for name in adapted} == set(layers)
    assert len(adapted) == 2 * len(layers)


def test_chosen_layers_alone_are_adapted() -> None:
    model = tiny_llama()
    add_lora(model, LoraSettings(rank=2, target_modules=("q_proj",)), seed=1)
    adapted = {name for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 2
    assert all("q_proj" in name for name in adapted)


def test_the_seed_decides_the_adapters_random_half() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = tiny_llama()
        add_lora(model, LORA, seed=seed)
        drawn.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_off_is_the_base_on_is_not_and_merged_is_on(make: type) -> None:
    model: PreTrainedModel = make()
    base = logits(model)
    wrapper = add_lora(model, LORA, seed=1)
    disturb(TrainedModel(model, wrapper, Path()))
    on = logits(model)
    assert furthest(on, base) > 1e-2
    with without_adapter(wrapper):
        assert furthest(logits(model), base) == 0.0
    assert furthest(logits(model), on) == 0.0
    merged = merge(wrapper, dtype=torch.float32)
    assert furthest(logits(merged), on) <= 1e-5
    assert not any(".lora_" in name for name, _ in merged.named_parameters())


def test_the_update_is_scaled_by_alpha_over_rank() -> None:
    model = tiny_llama()
    wrapper = add_lora(model, LoraSettings(rank=4, alpha=6, target_modules=("o_proj",)), seed=1)
    layer = model.base_model.layers[0].self_attn.o_proj
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merge(wrapper, dtype=torch.float32).base_model.layers[0].self_attn.o_proj.weight
    torch.testing.assert_close(merged - before, 6.0 / 4 * update, rtol=0, atol=1e-6)


def test_without_an_adapter_nothing_is_switched() -> None:
    with without_adapter(None):
        pass


def test_the_saved_folder_is_the_merged_model(directory: Path, tmp_path: Path) -> None:
    trained = disturb(policy_of(directory, settings()))
    on = logits(trained.model)
    trained.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    assert furthest(logits(loaded), on) <= 1e-5
    assert furthest(logits(load_causal_model(tmp_path / "out", dtype=torch.float32)), on) <= 1e-5
    base = load_causal_model(directory, dtype=torch.float32)
    assert furthest(logits(loaded), logits(base)) > 1e-2


def test_the_saved_folder_holds_no_adapter_and_the_same_tokenizer(directory: Path, tmp_path: Path) -> None:
    disturb(policy_of(directory, settings())).save(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any("adapter" in name for name in names)
    assert not names & {"pytorch_model.bin", "training_args.bin"}
    keys = []
    for folder in (tmp_path / "out", directory):
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            keys.append(set(weights.keys()))
    assert keys[0] == keys[1]
    copied = [name for name in TOKENIZER_FILES if (directory / name).exists()]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(copied)
    for name in copied:
        assert sha256_file(tmp_path / "out" / name) == sha256_file(directory / name)


def test_a_training_that_changed_nothing_is_not_saved(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="changed no weight"):
        policy_of(directory, settings()).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_training_lost_in_the_storage_format_is_not_saved(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "base", seed=0)
    model = load_causal_model(tmp_path / "base", dtype=torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "base")
    trained = disturb(policy_of(tmp_path / "base", settings()), size=1e-12)
    with pytest.raises(DivergedError, match="bfloat16"):
        trained.save(tmp_path / "out")


def test_full_training_saves_all_weights(directory: Path, tmp_path: Path) -> None:
    trained = disturb(policy_of(directory, settings(adapter=None)), size=0.01)
    assert trained.adapter is None
    on = logits(trained.model)
    trained.save(tmp_path / "out")
    assert furthest(logits(load_causal_model(tmp_path / "out", dtype=torch.float32)), on) <= 1e-5


def test_a_saved_reward_model_keeps_its_head(directory: Path, tmp_path: Path) -> None:
    trained = disturb(reward_model_of(directory, settings()))
    head = head_of(trained.model).weight.detach().clone()
    trained.save(tmp_path / "out")
    loaded = load_scalar_model(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(head_of(loaded).weight, head)


def test_dropout_is_off_unless_asked_for(directory: Path) -> None:
    quiet = policy_of(directory, settings()).model
    assert not any(module.training for module in quiet.modules())
    chosen = settings(adapter=LoraSettings(rank=2, dropout=0.5))
    model = load_causal_model(directory, dtype=torch.float32)
    trained = prepare(model, directory, chosen, seed=0)
    dropped = [m for m in trained.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert dropped
    assert all(module.training for module in dropped)
