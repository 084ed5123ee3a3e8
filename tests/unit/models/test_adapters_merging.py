"""Merging: every family on every layout of weights, proven on prompts; what is broken or lost is not saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from pipeline_lib.errors import ConfigError, DivergedError
from pipeline_lib.models.adapters import add_adapter, in_evaluation_mode, without_adapter
from pipeline_lib.models.merging import merge
from pipeline_lib.models.settings import AdapterSettings, Ia3Settings, LoraSettings, QloraSettings
from tests.toy import byte_ids, tiny_llama

FAMILIES: dict[str, AdapterSettings] = {
    "lora": LoraSettings(rank=4),
    "rslora": LoraSettings(rank=4, use_rslora=True),
    "dora": LoraSettings(rank=4, use_dora=True),
    "dropout": LoraSettings(rank=4, dropout=0.5),
    "ia3": Ia3Settings(),
}
IDS = torch.tensor([byte_ids("what is a tree?")])


def llama() -> PreTrainedModel:
    return tiny_llama(sharpness=2.0)


def gpt2() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def adapted(model: PreTrainedModel, chosen: AdapterSettings, *, size: float = 0.05) -> PeftModel:
    """An adapter whose weights were moved by chance, in place of training."""
    wrapper = add_adapter(model, chosen, seed=1, encode=byte_ids)
    assert isinstance(wrapper, PeftModel)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return wrapper


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), in_evaluation_mode(model):
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_is_adapted_and_off_is_the_base(make: Callable[[], PreTrainedModel], name: str) -> None:
    model = make()
    base = logits(model)
    wrapper = add_adapter(model, FAMILIES[name], seed=1, encode=byte_ids)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    model = make()
    wrapper = adapted(model, FAMILIES[name])
    on = logits(model)
    assert float((on - base).abs().max()) > 5e-3
    with without_adapter(wrapper):
        torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
    merged = merge(wrapper, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), on, rtol=0, atol=1e-4)
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in make().named_parameters()}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_trained_weights_are_fp32_on_a_bf16_base(name: str) -> None:
    model = llama().to(torch.bfloat16)
    adapted(model, FAMILIES[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.dtype == torch.float32 for parameter in trained)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model = tiny_llama()
    wrapper = add_adapter(
        model, LoraSettings(rank=4, alpha=6, target_modules=("o_proj",), use_rslora=True), seed=1, encode=byte_ids
    )
    assert isinstance(wrapper, PeftModel)
    layer = model.base_model.layers[0].self_attn.o_proj
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merge(wrapper, dtype=torch.float32).base_model.layers[0].self_attn.o_proj.weight
    torch.testing.assert_close(merged - before, 6.0 / math.sqrt(4) * update, rtol=0, atol=1e-6)


def test_ia3_has_as_many_weights_as_the_paper_says() -> None:
    model = tiny_llama()
    add_adapter(model, Ia3Settings(), seed=1, encode=byte_ids)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 2 * (32 + 32 + 128)  # layers x (keys + values + feed-forward)


def test_ia3_on_an_unknown_architecture_asks_for_the_layers() -> None:
    sizes = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64))
    model.config.model_type = "unheard_of"
    with pytest.raises(ConfigError, match="'unheard_of' model IA3 scales is not known"):
        add_adapter(model, Ia3Settings(), seed=1, encode=byte_ids)
    with pytest.raises(ConfigError, match="not all in"):
        add_adapter(tiny_llama(), Ia3Settings(feedforward_modules=("gate_proj",)), seed=1, encode=byte_ids)


def test_dropout_is_off_while_scoring_and_on_after() -> None:
    model = llama()
    adapted(model, FAMILIES["dropout"])
    torch.manual_seed(0)
    with torch.no_grad():
        noisy = [model(input_ids=IDS).logits for _ in range(2)]
    assert not torch.equal(noisy[0], noisy[1])
    assert torch.equal(logits(model), logits(model))
    assert any(module.training for module in model.modules())
    assert not model.training


def test_the_models_own_dropout_stays_off() -> None:
    model = gpt2()
    adapted(model, FAMILIES["dropout"])
    active = [
        name for name, module in model.named_modules() if module.training and isinstance(module, torch.nn.Dropout)
    ]
    assert active
    assert all(".lora_dropout." in name for name in active)


@pytest.fixture
def broken_merge(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A merge that forgets the adapters, or adds another number."""

    def breaks(factor: float) -> None:
        whole = BaseTuner.merge_and_unload

        def wrong(self: BaseTuner, **how: bool) -> object:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(factor)
            return whole(self, safe_merge=how["safe_merge"])

        monkeypatch.setattr(BaseTuner, "merge_and_unload", wrong)

    return breaks


@pytest.mark.parametrize("factor", [0.0, 0.9, -1.0])
def test_a_merge_that_loses_or_changes_the_update_is_stopped(
    factor: float, broken_merge: Callable[[float], None]
) -> None:
    wrapper = adapted(llama(), FAMILIES["lora"])
    broken_merge(factor)
    with pytest.raises(DivergedError, match="merged model is not the adapted one"):
        merge(wrapper, dtype=torch.float32)


def test_adapters_that_are_not_finite_are_not_merged() -> None:
    wrapper = adapted(llama(), FAMILIES["lora"])
    with torch.no_grad():
        next(parameter for parameter in wrapper.parameters() if parameter.requires_grad)[0, 0] = math.nan
    with pytest.raises(DivergedError, match="merged"):
        merge(wrapper, dtype=torch.float32)


def test_an_update_that_rounding_swallows_is_stopped_and_half_of_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DivergedError, match=r"no weight in the storage format torch\.bfloat16"):
        merge(adapted(llama().to(torch.bfloat16), FAMILIES["lora"], size=1e-7), dtype=torch.bfloat16)
    merge(adapted(llama().to(torch.bfloat16), FAMILIES["lora"], size=1e-5), dtype=torch.bfloat16)
    assert "rounding to torch.bfloat16 moves the model" in caplog.text
    caplog.clear()
    merge(adapted(llama().to(torch.bfloat16), FAMILIES["lora"]), dtype=torch.bfloat16)
    assert not caplog.text


def test_qlora_merges_into_the_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    base = logits(llama())
    with monkeypatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(torch.cuda, "is_available", lambda: True)  # bitsandbytes rounds on the processor too
        model = llama()
        wrapper = add_adapter(model, QloraSettings(rank=4), seed=1, encode=byte_ids)
    assert isinstance(wrapper, PeftModel)
    rounded = logits(model)
    assert 1e-3 < float((rounded - base).abs().max()) < 2.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    on = logits(model)
    merged = merge(wrapper, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), on, rtol=0, atol=1e-4)
    assert all(type(layer).__name__ != "Linear4bit" for layer in merged.modules())
