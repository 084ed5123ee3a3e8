"""LoRA as one operation: peft's numbers, peft's gradients, fewer tensors kept; peft's way where more is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from pipeline_lib.models import fused_lora
from pipeline_lib.models.fused_lora import FusedLoraLinear, fuse_lora, summed_weights


class Two(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7, bias=False), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def adapted(*, dtype: torch.dtype = torch.float64, is_fused: bool, **chosen: Any) -> PeftModel:
    """Build the same adapted model each time; A and B are both at random, so that both have gradients."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["up", "down"], **chosen)
    wrapper = get_peft_model(Two().to(dtype), config)
    with torch.no_grad():
        for name, value in wrapper.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape))
    if is_fused:
        fuse_lora(wrapper)
    return wrapper.eval()


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and all gradients of a sum of squares."""
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **grads}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every call that goes peft's way."""
    found: list[str] = []
    theirs = LoraLinear.forward

    def noted(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(type(self).__name__)
        result: Tensor = theirs(self, x, *args, **kwargs)
        return result

    monkeypatch.setattr(LoraLinear, "forward", noted)
    return found


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1,), (2, 1, 2)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], use_rslora: bool, calls: list[str]) -> None:
    x = inputs(*shape)
    theirs = run(adapted(is_fused=False, use_rslora=use_rslora), x)
    calls.clear()
    ours = run(adapted(is_fused=True, use_rslora=use_rslora), x)
    assert not calls
    assert sum("lora" in name for name in ours) == 4
    assert furthest(ours, theirs) < 1e-12


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, a, b = draw(3, 5), draw(2, 5), draw(7, 2)
    weight, bias = draw(7, 5).detach(), draw(7).detach()

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = fused_lora._FusedLora.apply(x, weight, bias, a, b, 1.5)  # type: ignore[no-untyped-call]
        return result

    assert torch.autograd.gradcheck(fused, (x, a, b))
    by_hand = x @ (weight + 1.5 * b @ a).T + bias
    assert float((fused(x, a, b) - by_hand).detach().abs().max()) < 1e-12


def test_what_needs_no_gradient_gets_none() -> None:
    model = adapted(is_fused=True)
    for name, value in model.named_parameters():
        value.requires_grad_("down" in name and "lora_A" in name)
    model(inputs(3)).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is not None] == [
        "base_model.model.down.lora_A.default.weight"
    ]


def test_half_precision_keeps_no_copy_of_the_inputs_in_single() -> None:
    """peft keeps an fp32 copy of every input; the gradients of the fp32 matrices stay fp32."""
    kept: dict[bool, list[torch.dtype]] = {}
    x = inputs(64, dtype=torch.bfloat16)
    for is_fused in (False, True):
        model = adapted(dtype=torch.bfloat16, is_fused=is_fused)
        large: list[torch.dtype] = []

        def note(tensor: Tensor, large: list[torch.dtype] = large) -> Tensor:
            if tensor.shape[:1] == (64,) and tensor.shape[-1] >= 5:
                large.append(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(x)
        output.float().sum().backward()
        kept[is_fused] = large
        assert {value.grad.dtype for value in model.parameters() if value.grad is not None} == {torch.float32}
    assert torch.float32 in kept[False]
    assert set(kept[True]) == {torch.bfloat16}


def test_half_precision_is_as_close_to_the_truth_as_pefts() -> None:
    x = inputs(256)
    truth = run(adapted(is_fused=False), x)
    half = {is_fused: run(adapted(dtype=torch.bfloat16, is_fused=is_fused), x.bfloat16()) for is_fused in (False, True)}

    def error(found: dict[str, Tensor], name: str) -> float:
        return float((found[name].double() - truth[name]).norm() / truth[name].norm())

    for name in truth:
        assert error(half[True], name) < max(2 * error(half[False], name), 0.02), name


def _two_adapters(model: PeftModel, **chosen: Any) -> None:
    """Add a second adapter of another rank and scaling; both speak."""
    model.add_adapter("more", LoraConfig(r=1, lora_alpha=5, target_modules=["up", "down"], **chosen))
    model.base_model.set_adapter(["default", "more"])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".more." in name:
                value.copy_(torch.randn(value.shape, generator=generator))


def _dropped_and_plain(model: PeftModel) -> None:
    _two_adapters(model, lora_dropout=0.5)
    model.train()


def _hooked(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.get_base_layer().register_forward_hook(lambda *_: None)


def _trained_base(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.get_base_layer().weight.requires_grad_()


@pytest.mark.parametrize("change", [_dropped_and_plain, _hooked, _trained_base, lambda model: model.merge_adapter()])
def test_whatever_else_is_in_a_layer_goes_pefts_way(change: Callable[[PeftModel], None], calls: list[str]) -> None:
    both = {is_fused: adapted(is_fused=is_fused) for is_fused in (False, True)}
    found = {}
    for is_fused, model in both.items():
        torch.manual_seed(5)
        change(model)
        torch.manual_seed(6)
        found[is_fused] = model(inputs(4))
    assert calls.count("FusedLoraLinear") == 2
    assert torch.equal(found[True], found[False])


@pytest.mark.parametrize("frozen", [(), ("default",), ("more",)])
def test_several_adapters_at_once_are_one_operation(frozen: tuple[str, ...], calls: list[str]) -> None:
    found = {}
    for is_fused in (False, True):
        model = adapted(is_fused=is_fused)
        _two_adapters(model)
        for name, value in model.named_parameters():
            if any(f".{adapter}." in name for adapter in frozen):
                value.requires_grad_(requires_grad=False)
        calls.clear()
        found[is_fused] = run(model, inputs(2, 3))
    assert not calls
    assert sum("lora" in name for name in found[True]) == 8 - 4 * len(frozen)
    assert furthest(found[True], found[False]) < 1e-12 * 5000  # the largest gradient


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_a_sampling_step_has_the_same_numbers(rows: int) -> None:
    """One position a row and no gradient: the product goes by the transposes up to 64 rows."""
    both = [adapted(is_fused=is_fused) for is_fused in (False, True)]
    x = inputs(rows, 1)
    with torch.inference_mode():
        theirs, ours = (model(x) for model in both)
    assert ours.shape == (rows, 1, 3)
    assert float((ours - theirs).abs().max()) < 1e-12


@pytest.mark.parametrize("num_adapters", [1, 2])
def test_sampling_multiplies_once_by_the_sum(num_adapters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [adapted(is_fused=is_fused) for is_fused in (False, True)]
    if num_adapters == 2:
        for model in both:
            _two_adapters(model)
    theirs, ours = both
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    expected = theirs(inputs(3, 1))
    with summed_weights(ours), monkeypatch.context() as patched:
        patched.setattr(fused_lora, "_product", None)
        with torch.inference_mode():
            assert float((ours(inputs(3, 1)) - expected).abs().max()) < 1e-12
    with summed_weights(ours):
        # A gradient asks for both products even here.
        assert furthest(run(ours, inputs(3)), run(theirs, inputs(3))) < 1e-12 * 5000
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad(), ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(inputs(3)), theirs(inputs(3)))


@pytest.mark.parametrize("change", [_dropped_and_plain, _hooked, _trained_base, lambda model: model.merge_adapter()])
def test_only_plain_layers_are_summed(change: Callable[[PeftModel], None]) -> None:
    model = adapted(is_fused=True)
    change(model)
    with summed_weights(model):
        assert not any(module.summed_ED is not None for module in model.modules() if isinstance(module, LoraLinear))


def test_coarse_weights_are_not_summed() -> None:
    """The sum of a weight and a small adapter, in bf16, is the weight."""
    model = adapted(is_fused=True, dtype=torch.bfloat16)
    with summed_weights(model):
        assert all(module.summed_ED is None for module in model.modules() if isinstance(module, FusedLoraLinear))


def test_dropout_and_dora_go_pefts_way(calls: list[str]) -> None:
    dropped = adapted(is_fused=True, lora_dropout=0.5)
    dropped(inputs(4))
    assert not calls
    dropped.train()
    dropped(inputs(4))
    assert calls.count("FusedLoraLinear") == 2
    calls.clear()
    assert (
        furthest(
            run(adapted(is_fused=True, use_dora=True), inputs(4)),
            run(adapted(is_fused=False, use_dora=True), inputs(4)),
        )
        == 0
    )
    assert calls.count("FusedLoraLinear") == 2


def test_switched_off_it_is_the_base() -> None:
    model = adapted(is_fused=True)
    torch.manual_seed(0)
    base = Two().double()
    with model.disable_adapter():
        assert torch.equal(model(inputs(4)), base(inputs(4)))


def test_only_plain_layers_change_their_class() -> None:
    model = adapted(is_fused=True)
    assert sum(isinstance(module, FusedLoraLinear) for module in model.modules()) == 2
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 2
