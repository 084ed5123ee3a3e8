"""What is read is what the whole forward says; what is not read is not computed behind the last attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline_lib.models.backbone import hidden_states
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, pack, pad
from pipeline_lib.training.forward import training_forward
from tests.toy import tiny_llama


@pytest.fixture
def model() -> PreTrainedModel:
    found = tiny_llama(dtype=torch.float64)
    assert supports_trees(found)  # tried out here, so that a test sees its own forwards alone
    return found


def batch(*, is_packed: bool = True) -> TreeBatch:
    trees = [Tree("0", (3, 4, 5), ((6, 7), (8,)), (False,) * 3), Tree("1", (3, 4, 9), ((7, 7, 6),), (False,) * 3)]
    return pack(trees) if is_packed else pad(trees, pad_id=0)


@pytest.fixture
def rows(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many positions the output of each layer's attention and its feed-forward compute."""
    found: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def noted(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            found.append(hidden.shape[0] * hidden.shape[1])
            return forward(hidden)

        return run

    for layer in layers:
        attention: Any = layer.self_attn
        for part in (attention.o_proj, layer.mlp):
            monkeypatch.setattr(part, "forward", noted(part.forward))
    return found


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("name", ["source_N", "last_R"])
def test_what_is_read_and_its_gradients_are_the_same(
    model: PreTrainedModel, rows: list[int], name: str, is_packed: bool
) -> None:
    given = batch(is_packed=is_packed)
    read: Tensor = getattr(given, name)
    found = {}
    for is_asked in (False, True):
        rows.clear()
        model.zero_grad()
        hidden_ND = hidden_states(model, given, read=read if is_asked else None)[read]
        hidden_ND.sin().sum().backward()
        grads = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
        found[is_asked] = (hidden_ND.detach(), grads, list(rows))
    whole, asked = found[False], found[True]
    torch.testing.assert_close(asked[0], whole[0], rtol=1e-12, atol=1e-12)
    assert asked[1].keys() == whole[1].keys()
    for key, grad in whole[1].items():
        torch.testing.assert_close(asked[1][key], grad, rtol=1e-10, atol=1e-12)
    positions = given.input_ids_BT.numel()
    assert whole[2] == [positions] * len(whole[2])
    assert asked[2] == [*whole[2][:-2], *[int(read.unique().numel())] * 2]


def test_all_positions_may_be_read(model: PreTrainedModel) -> None:
    given = batch()
    everything = torch.arange(given.input_ids_BT.numel()).flip(0)
    assert torch.equal(hidden_states(model, given, read=everything), hidden_states(model, given))


def test_where_activations_are_computed_again_the_layer_is_whole(model: PreTrainedModel, rows: list[int]) -> None:
    given = batch()
    with training_forward([model], given, gradient_checkpointing=True):
        hidden_states(model, given, read=given.last_R)[given.last_R].sum().backward()
    assert set(rows) == {given.input_ids_BT.numel()}


def test_nothing_stays_behind(model: PreTrainedModel) -> None:
    given = batch()
    hidden_states(model, given, read=given.last_R)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not any(hooks)


@pytest.mark.parametrize("ending", ["mlp", "o_proj"])
def test_a_part_that_something_else_listens_to_is_whole(model: PreTrainedModel, rows: list[int], ending: str) -> None:
    given = batch()
    part = next(module for name, module in reversed(list(model.named_modules())) if name.endswith(ending))
    part.register_forward_hook(lambda *_: None)
    hidden_states(model, given, read=given.last_R)
    last = [int(given.last_R.unique().numel())] * 2
    last[("o_proj", "mlp").index(ending)] = given.input_ids_BT.numel()
    assert rows[-2:] == last
