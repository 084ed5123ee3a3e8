"""Packed trees and padded rows say the same; every response token counts once, every tree is in one bin."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline_lib.losses.tokens import masked_mean
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, bins, pack, pad, trunk_length
from tests.toy import tiny_llama

VOCABULARY = 259
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Uneven distributions: with small weights every token would be as likely wherever it stands.
SPREAD: dict[str, Any] = {"initializer_range": 0.5}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **SPREAD),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, **SPREAD),
    "gemma": GemmaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, **SPREAD),
}


@cache
def model_of(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    if kind == "llama":
        return exact_norms(tiny_llama(dtype=dtype, sharpness=10.0))
    if kind == "plain llama":
        return tiny_llama(dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind])
    return model.to(dtype).eval()


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Let the norms compute in the model's own format: Llama's go through float32 whatever it is."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                width, dtype = child.weight.shape[0], child.weight.dtype
                setattr(module, name, torch.nn.RMSNorm(width, eps=child.variance_epsilon, dtype=dtype))
    return model


ids = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=6).map(tuple)


@st.composite
def tree_lists(draw: st.DrawFn, *, max_trees: int = 4) -> list[Tree]:
    """Trees of 1 to 4 responses, some with one beginning; in some, earlier turns of the prompt count."""
    trees = []
    beginning = draw(st.sampled_from([(), (5, 6, 7), (3,)]))
    for index in range(draw(st.integers(1, max_trees))):
        prompt = (*beginning, *draw(ids))
        responses = draw(st.lists(ids, min_size=1, max_size=4))
        counts = (False,) * len(prompt)
        if len(responses) == 1:
            counts = tuple(draw(st.lists(st.booleans(), min_size=len(prompt), max_size=len(prompt))))
        trees.append(Tree(str(index), prompt, tuple(responses), counts))
    return trees


def counted_by_hand(trees: list[Tree]) -> list[tuple[int, int]]:
    """(response, token) of everything that should count, in order."""
    expected = []
    response = 0
    for tree in trees:
        for offset, (token, counts) in enumerate(zip(tree.prompt_ids, tree.prompt_counts, strict=True)):
            if counts and offset > 0:
                expected.append((response, token))
        for branch in tree.response_ids:
            expected += [(response, token) for token in branch]
            response += 1
    return expected


def one_by_one(model: PreTrainedModel, trees: list[Tree]) -> Tensor:
    """The log-probabilities of all counted tokens, each text run alone and through the full logits."""
    found = []
    for tree in trees:
        for branch in tree.response_ids:
            whole = torch.tensor([[*tree.prompt_ids, *branch]])
            with torch.no_grad():
                logp_TV = torch.log_softmax(model(whole).logits[0, :-1], dim=-1)
            logp_T = logp_TV.gather(1, whole[0, 1:, None])[:, 0]
            counts = [*tree.prompt_counts[1:], *[True] * len(branch)]
            found.append(logp_T[torch.tensor(counts)])
    return torch.cat(found)


def logps_and_gradients(model: PreTrainedModel, batch: TreeBatch, weights_N: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    token_logp_N = token_logps(model, batch).token_logp_N
    (token_logp_N * weights_N).sum().backward()
    gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return token_logp_N.detach(), gradients


@given(tree_lists())
@settings(max_examples=12, deadline=None)
def test_packed_padded_and_single_runs_agree_in_float64(trees: list[Tree]) -> None:
    model = model_of("llama", torch.float64)
    packed, padded = pack(trees), pad(trees, pad_id=0)
    weights_N = torch.linspace(-1, 2, packed.num_counted, dtype=torch.float64)
    packed_N, packed_gradients = logps_and_gradients(model, packed, weights_N)
    padded_N, padded_gradients = logps_and_gradients(model, padded, weights_N)
    torch.testing.assert_close(packed_N, one_by_one(model, trees), rtol=0, atol=1e-9)
    torch.testing.assert_close(padded_N, packed_N, rtol=0, atol=1e-9)
    for one, other in zip(packed_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(tree_lists())
@settings(max_examples=6, deadline=None)
def test_packed_and_padded_agree_in_float32(trees: list[Tree]) -> None:
    model = model_of("plain llama", torch.float32)
    weights_N = torch.ones(pack(trees).num_counted)
    packed_N, packed_gradients = logps_and_gradients(model, pack(trees), weights_N)
    padded_N, padded_gradients = logps_and_gradients(model, pad(trees, pad_id=0), weights_N)
    torch.testing.assert_close(packed_N, padded_N, rtol=0, atol=1e-5)
    for one, other in zip(packed_gradients, padded_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums over many tokens


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma"])
@given(trees=tree_lists(max_trees=3))
@settings(max_examples=6, deadline=None)
def test_padded_rows_agree_with_single_runs_on_other_architectures(kind: str, trees: list[Tree]) -> None:
    model = model_of(kind, torch.float64)
    with torch.no_grad():
        padded_N = token_logps(model, pad(trees, pad_id=0)).token_logp_N
    # Qwen2's and Gemma's norms go through float32.
    torch.testing.assert_close(padded_N, one_by_one(model, trees), rtol=0, atol=1e-9 if kind == "gpt2" else 1e-5)


@given(trees=tree_lists(max_trees=3))
@settings(max_examples=6, deadline=None)
def test_packed_trees_agree_on_qwen2(trees: list[Tree]) -> None:
    model = model_of("qwen2", torch.float64)
    with torch.no_grad():
        packed_N = token_logps(model, pack(trees)).token_logp_N
    torch.testing.assert_close(packed_N, one_by_one(model, trees), rtol=0, atol=1e-5)  # norms in float32


@given(tree_lists(max_trees=8))
@settings(max_examples=100, deadline=None)
def test_every_response_token_counts_exactly_once(trees: list[Tree]) -> None:
    expected = counted_by_hand(trees)
    for batch in (pack(trees), pad(trees, pad_id=0)):
        found = list(zip(batch.response_N.tolist(), batch.label_N.tolist(), strict=True))
        assert found == expected
        assert batch.num_responses == sum(len(tree.response_ids) for tree in trees)
        assert batch.lengths_R.tolist() == [
            Counter(response for response, _ in expected)[index] for index in range(batch.num_responses)
        ]
        flat = batch.input_ids_BT.reshape(-1)
        assert flat[batch.last_R].tolist() == [branch[-1] for tree in trees for branch in tree.response_ids]


@given(tree_lists(max_trees=8))
@settings(max_examples=100, deadline=None)
def test_padded_rows_say_what_they_hold(trees: list[Tree]) -> None:
    batch = pad(trees, pad_id=0)
    rows = [(*tree.prompt_ids, *branch) for tree in trees for branch in tree.response_ids]
    for row, mask, whole in zip(batch.input_ids_BT.tolist(), batch.token_mask_BT.int().tolist(), rows, strict=True):
        assert tuple(row[: len(whole)]) == whole
        assert mask == [1] * len(whole) + [0] * (len(row) - len(whole))
        assert not any(row[len(whole) :])


@given(tree_lists(max_trees=4))
@settings(max_examples=100, deadline=None)
def test_a_packed_position_sees_its_own_text_and_nothing_else(trees: list[Tree]) -> None:
    batch = pack(trees)
    assert batch.visibility is not None
    seen_TT = batch.visibility.dense()
    ids_T, positions_T = batch.input_ids_BT[0], batch.position_ids_BT[0]
    response = 0
    for tree in trees:
        for branch in tree.response_ids:
            visible = seen_TT[batch.last_R[response]]
            assert tuple(ids_T[visible].tolist()) == (*tree.prompt_ids, *branch)
            assert positions_T[visible].tolist() == list(range(len(tree.prompt_ids) + len(branch)))
            response += 1


@given(tree_lists(max_trees=12), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_bins_hold_every_tree_once_within_the_budget(trees: list[Tree], budget: int) -> None:
    found = bins(trees, token_budget=budget)
    assert sorted(index for members in found for index in members) == list(range(len(trees)))
    for members in found:
        used = sum(trees[index].num_tokens for index in members)
        assert used <= budget or len(members) == 1
    assert found == bins(trees, token_budget=budget)


@given(tree_lists(max_trees=12), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_rows_with_a_trunk_are_filled_to_the_budget(trees: list[Tree], budget: int) -> None:
    """What all trees begin with stands once in a row: a row is never longer than the budget for it."""
    found = bins(trees, token_budget=budget, shared=trunk_length(trees))
    assert sorted(index for members in found for index in members) == list(range(len(trees)))
    for members in found:
        row = pack([trees[index] for index in members])
        assert row.input_ids_BT.shape[1] <= budget or len(members) == 1


def test_a_shared_beginning_makes_room_by_hand() -> None:
    trees = [Tree(str(own), (7,) * 4 + (own,), ((9,),), (False,) * 5) for own in range(4)]
    # Six tokens each, four of them shared: 4 + 2 + 2 + 2 = 10.
    assert bins(trees, token_budget=10) == [[0], [1], [2], [3]]
    assert bins(trees, token_budget=10, shared=trunk_length(trees)) == [[0, 1, 2], [3]]


def test_bins_are_first_fit_decreasing_by_hand() -> None:
    sizes = [2, 7, 5, 3, 9, 1]
    trees = [Tree(str(size), (3,) * (size - 1), ((4,),), (False,) * (size - 1)) for size in sizes if size > 1]
    trees.append(Tree("1", (), ((4,),), ()))
    # By size: 9 opens a bin, 7 a second, 5 a third, 3 goes beside 7, 2 beside 5, 1 beside 9.
    assert bins(trees, token_budget=10) == [[4, 5], [1, 3], [0, 2]]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_sums_by_response_add_up(values: list[float]) -> None:
    lengths = [len(values[::2]), len(values[1::2])]
    trees = [Tree(str(n), (3,), ((4,) * size,), (False,)) for n, size in enumerate(lengths) if size]
    batch = pack(trees)
    values_N = torch.tensor(values, dtype=torch.float64)
    sums_R = batch.sum_by_response(values_N)
    torch.testing.assert_close(sums_R.sum(), values_N.sum(), rtol=0, atol=1e-12)
    mean = masked_mean(values_N, torch.ones_like(values_N, dtype=torch.bool))
    torch.testing.assert_close((sums_R / batch.lengths_R).dot(batch.lengths_R.double()) / len(values), mean)
