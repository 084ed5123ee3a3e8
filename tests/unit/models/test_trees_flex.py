"""FlexAttention under the block mask of the trees equals attention tree by tree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline_lib.models import attention
from pipeline_lib.models.attention import TreeMasks, attention_of_trees, block_mask, flex
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.text import visibility as visibility_module
from pipeline_lib.text.pack import TreeBatch, pack, pad
from pipeline_lib.text.visibility import Visibility
from tests.toy import short_tree, tiny_llama

LONG = [
    short_tree("a", [5, 6, 7, *range(10, 90)], [8] * 60, [9] * 131, [10] * 7),
    short_tree("b", [5, 6, 7, *range(60, 61)], [11] * 200),
    short_tree("c", [5, 6, 7, *range(91, 240)], [12] * 3, [13] * 90),
]
"""More than five blocks of 128 positions, of which some see nothing of others."""


def visibility_of(batch: TreeBatch) -> Visibility:
    assert batch.visibility is not None
    return batch.visibility


def drawn(visibility: Visibility, *, heads: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = visibility.num_positions
    query = torch.randn(1, 4, length, 16, generator=generator)
    key, value = (torch.randn(1, heads, prefix + length, 16, generator=generator) for _ in range(2))
    return query, key, value


@pytest.mark.parametrize(
    ("heads", "prefix", "window", "softcap"),
    [(4, 0, None, None), (2, 0, None, None), (2, 5, None, None), (2, 0, 40, None), (1, 0, None, 2.0), (4, 3, 150, 2.0)],
)
def test_blocks_equal_trees_on_any_layer(heads: int, prefix: int, window: int | None, softcap: float | None) -> None:
    visibility = visibility_of(pack(LONG))
    query, key, value = drawn(visibility, heads=heads, prefix=prefix)
    by_part, _ = attention_of_trees(
        nn.Identity(), query, key, value, None, tree_masks=TreeMasks(visibility), scaling=0.3,
        sliding_window=window, softcap=softcap,
    )  # fmt: skip
    blocks = block_mask(visibility, prefix=prefix, window=window)
    by_block = flex(query, key, value, blocks, scaling=0.3, softcap=softcap)
    assert by_part.shape == (1, visibility.num_positions, 4, 16)
    torch.testing.assert_close(by_block, by_part, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("prefix", "window", "softcap"), [(0, None, None), (5, None, None), (0, 40, None), (3, 150, 2.0)]
)
def test_trees_in_parts_equal_whole_trees(
    prefix: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for worth in (0, 10**9):
        monkeypatch.setattr(visibility_module, "PAIRS_WORTH_A_PART", worth)
        visibility = visibility_of(pack(LONG))
        query, key, value = (tensor.double().requires_grad_() for tensor in drawn(visibility, heads=2, prefix=prefix))
        output, _ = attention_of_trees(
            nn.Identity(), query, key, value, None, tree_masks=TreeMasks(visibility), sliding_window=window,
            softcap=softcap,
        )  # fmt: skip
        output.square().sum().backward()
        found[worth] = [output, query.grad, key.grad, value.grad], len(visibility.parts)
    assert found[0][1] > found[10**9][1]
    for one, other in zip(found[0][0], found[10**9][0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_blocks_that_no_tree_sees_are_left_out() -> None:
    visibility = visibility_of(pack(LONG))
    mask = block_mask(visibility)
    rows = -(-visibility.num_positions // attention.BLOCK_SIZE)
    assert rows > 5
    assert mask.full_kv_num_blocks is not None
    visited = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    needed = visibility.dense()
    by_hand = sum(
        bool(needed[q : q + 128, k : k + 128].any())
        for q in range(0, visibility.num_positions, 128)
        for k in range(0, visibility.num_positions, 128)
    )
    assert visited == by_hand < rows * (rows + 1) // 2


def test_the_block_mask_of_a_long_row_needs_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(Visibility, "between", refuse)
    trees = [short_tree(str(n), [n, *[5] * 500], [6] * 300, [7] * 223) for n in range(8)]
    mask = block_mask(visibility_of(pack(trees)))
    assert mask.seq_lengths == (8192, 8192)
    tensors = [mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, mask.q_indices]
    assert max(tensor.numel() for tensor in tensors if tensor is not None) == 64 * 64


def test_masks_are_made_once_a_batch() -> None:
    masks = TreeMasks(visibility_of(pack(LONG)))
    how: dict[str, Any] = {"prefix": 0, "window": None}
    assert masks.blocks(**how) is masks.blocks(**how)
    first = masks.by_part(**how, dtype=torch.float32)
    assert first is masks.by_part(**how, dtype=torch.float32)
    assert masks.for_queries(masks.visibility.num_positions) is masks
    assert masks.for_queries(masks.visibility.num_positions + 2) is masks.for_queries(
        masks.visibility.num_positions + 2
    )


def with_flex(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Send every layer through FlexAttention, on any device; returns where calls are counted."""
    calls: list[int] = []

    def by_block(query: Tensor, *args: Any, dropout: float, **how: Any) -> Tensor:
        calls.append(query.shape[2])
        return attention._block_by_block(query, *args, **how)

    monkeypatch.setattr(attention, "_part_by_part", by_block)
    return calls


def test_a_whole_model_says_the_same_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(sharpness=5.0)
    assert supports_trees(model)
    with torch.no_grad():
        expected_N = token_logps(model, pack(LONG)).token_logp_N
        torch.testing.assert_close(token_logps(model, pad(LONG, pad_id=0)).token_logp_N, expected_N, rtol=0, atol=1e-5)
        calls = with_flex(monkeypatch)
        found_N = token_logps(model, pack(LONG)).token_logp_N
    assert calls == [visibility_of(pack(LONG)).num_positions] * 2
    torch.testing.assert_close(found_N, expected_N, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_blocks_give_figures_and_gradients_of_padded_rows() -> None:
    device = torch.device("cuda")
    model = tiny_llama(sharpness=5.0).to(device)
    assert supports_trees(model)
    found = []
    for batch in (pack(LONG).to(device), pad(LONG, pad_id=0).to(device)):
        model.zero_grad(set_to_none=True)
        logp_N = token_logps(model, batch).token_logp_N
        logp_N.sum().backward()
        found.append(
            (logp_N.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-3)
    for name, gradient in found[1][1].items():
        apart = float((found[0][1][name] - gradient).abs().max())
        assert apart <= 1e-3 * max(1.0, float(gradient.abs().max())), name
