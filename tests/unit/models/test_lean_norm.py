"""RMS norms with a backward pass of their own: the library's bits forward, the derivative backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline_lib.models import lean_norm
from pipeline_lib.models.lean_norm import lean_norms
from tests.toy import tiny_llama


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def norms(*, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return the library's norm and ours."""
    theirs = LlamaRMSNorm(48, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(draw(48) + 1)
    theirs = theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    lean_norms(ours)
    return theirs, ours


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_forward_is_the_librarys_to_the_last_bit(scale: float) -> None:
    theirs, ours = norms()
    assert type(ours) is not type(theirs)
    assert type(ours).__name__ == "LlamaRMSNorm"
    x = scale * draw(2, 7, 48)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("is_weight_trained", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (1, 1)])
def test_gradients_are_the_librarys(shape: tuple[int, ...], is_weight_trained: bool) -> None:
    found = []
    for norm in norms():
        norm.requires_grad_(is_weight_trained)
        x = draw(*shape, 48).requires_grad_()
        norm(x).sin().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in norm.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_gradients_agree_with_finite_differences() -> None:
    x, weight = (draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 5), (5,)))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = lean_norm._RmsNorm.apply(x, weight, 0.1)  # type: ignore[no-untyped-call]
        return found

    assert torch.autograd.gradcheck(norm, (x, weight))


def test_a_model_keeps_its_logits_its_weights_and_its_class_names() -> None:
    theirs, ours = tiny_llama(), tiny_llama()
    lean_norms(ours)
    ids = torch.arange(12)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert [type(module).__name__ for module in ours.modules()] == [
        type(module).__name__ for module in theirs.modules()
    ]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    changed = [module for module in ours.modules() if isinstance(module, lean_norm._LeanNorm)]
    assert len(changed) == sum(isinstance(module, LlamaRMSNorm) for module in theirs.modules()) > 0
    again = copy.deepcopy(ours)
    assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_a_norm_that_rounds_in_between_or_is_built_otherwise_stays() -> None:
    theirs, ours = norms(dtype=torch.bfloat16)
    assert type(ours) is type(theirs)
    gemma = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip
    lean_norms(gemma)
    assert not any(isinstance(module, lean_norm._LeanNorm) for module in gemma.modules())
