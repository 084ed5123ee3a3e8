"""Who sees whom, from two numbers a position: against the rule written out, pair by pair."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline_lib.text import visibility as visibility_module
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, pack, pad
from pipeline_lib.text.visibility import PROMPT, TRUNK, Part, Visibility
from tests.toy import short_tree

shapes = st.lists(
    st.tuples(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


def packed(shared: int, forest: list[tuple[int, list[int]]]) -> Visibility:
    """Trees of given lengths; the number of a tree is in its first token, so that no more is shared."""
    trees = [
        short_tree(str(n), [*range(100, 100 + shared), n, *[7] * (prompt - 1)], *([8] * size for size in responses))
        for n, (prompt, responses) in enumerate(forest)
    ]
    visibility = pack(trees).visibility
    assert visibility is not None
    return visibility


def by_hand(visibility: Visibility, *, window: int | None = None) -> list[list[bool]]:
    """A position sees another iff that one is in the unpacked text that ends with it."""
    rows = list(
        zip(visibility.tree_T.tolist(), visibility.branch_T.tolist(), visibility.position_T.tolist(), strict=True)
    )
    seen = []
    for query, (tree, branch, position) in enumerate(rows):
        row = []
        for key, (other_tree, other_branch, other_position) in enumerate(rows):
            is_before = key <= query
            is_text = other_tree == TRUNK or (other_tree == tree and other_branch in (PROMPT, branch))
            is_near = window is None or position - other_position < window
            row.append(is_before and is_text and is_near)
        seen.append(row)
    return seen


@given(st.integers(0, 4), shapes, st.sampled_from([None, 1, 2, 5]))
@settings(max_examples=80, deadline=None)
def test_the_mask_is_the_rule(shared: int, forest: list[tuple[int, list[int]]], window: int | None) -> None:
    visibility = packed(shared, forest)
    assert visibility.dense(window=window).tolist() == by_hand(visibility, window=window)


@given(st.integers(0, 4), shapes, st.integers(0, 5), st.sampled_from([None, 1, 3, 6]), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=120, deadline=None)
def test_blocks_are_those_of_the_mask(
    shared: int, forest: list[tuple[int, list[int]]], prefix: int, window: int | None, size: int
) -> None:
    visibility = packed(shared, forest)
    num = visibility.num_positions
    whole_TK = torch.cat([torch.ones(num, prefix, dtype=torch.bool), visibility.dense(window=window)], dim=1)
    rows, columns = -(-num // size), -(-(num + prefix) // size)
    padded = torch.zeros(rows * size, columns * size, dtype=torch.bool)
    padded[:num, : num + prefix] = whole_TK
    tiles = padded.view(rows, size, columns, size).transpose(1, 2).flatten(2)
    found = visibility.blocks(block_size=size, prefix=prefix, window=window)
    assert torch.equal(found.all_QK, tiles.all(-1))
    assert torch.equal(found.some_QK, tiles.any(-1) & ~tiles.all(-1))


def test_a_mask_by_hand() -> None:
    # Trunk a a; tree 0: prompt b, responses c d and e; tree 1: prompt f, response g.
    visibility = packed(2, [(1, [2, 1]), (1, [1])])
    assert visibility.tree_T.tolist() == [-1, -1, 0, 0, 0, 0, 1, 1]
    assert visibility.branch_T.tolist() == [0, 0, 0, 1, 1, 2, 0, 1]
    assert visibility.position_T.tolist() == [0, 1, 2, 3, 4, 3, 2, 3]
    assert visibility.sizes == (2, 4, 2)
    assert visibility.longest_text == 5
    picture = ["".join("x" if seen else "." for seen in row) for row in visibility.dense().tolist()]
    assert picture == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xxxxx...",
        "xxx..x..",
        "xx....x.",
        "xx....xx",
    ]


def seen_by_parts(visibility: Visibility) -> Tensor:
    """Write out the mask that the parts stand for; parts that branch inside take it from the rule."""
    num = visibility.num_positions
    mask_TT = torch.zeros(num, num, dtype=torch.bool)
    places, start = [], 0
    for part in visibility.parts:
        own = slice(start, start + part.size)
        places.append(own)
        for index in part.before:
            mask_TT[own, places[index]] = True
        inside = torch.ones(part.size, part.size, dtype=torch.bool).tril()
        mask_TT[own, own] = inside if part.is_causal else visibility.between(own, own)
        start += part.size
    assert start == num
    return mask_TT


@given(st.integers(0, 4), shapes, st.sampled_from([0, 3, 10, 10**9]))
@settings(max_examples=80, deadline=None)
def test_parts_are_the_mask(shared: int, forest: list[tuple[int, list[int]]], worth: int) -> None:
    with patch.object(visibility_module, "PAIRS_WORTH_A_PART", worth):
        visibility = packed(shared, forest)
        assert seen_by_parts(visibility).tolist() == by_hand(visibility)
        if worth == 0:
            assert all(part.is_causal for part in visibility.parts)


def test_parts_by_hand() -> None:
    with patch.object(visibility_module, "PAIRS_WORTH_A_PART", 0):
        visibility = packed(2, [(1, [2, 1]), (1, [1])])
        assert visibility.parts == (
            Part(2, (), is_causal=True),
            Part(1, (0,), is_causal=True),
            Part(2, (0, 1), is_causal=True),
            Part(1, (0, 1), is_causal=True),
            Part(2, (0,), is_causal=True),
        )
    small = packed(2, [(1, [2, 1]), (1, [1])])
    assert small.parts == (Part(2, (), is_causal=True), Part(4, (0,), is_causal=False), Part(2, (0,), is_causal=True))
    large = packed(0, [(100, [80, 60])])
    assert [part.size for part in large.parts] == [100, 80, 60]


def test_tokens_put_in_front_are_seen_by_all() -> None:
    visibility = packed(1, [(1, [1, 1]), (2, [1])])
    longer = visibility.behind(2)
    assert longer.sizes == (3, *visibility.sizes[1:])
    assert longer.position_T.tolist() == [0, 1, *(visibility.position_T + 2).tolist()]
    assert torch.equal(longer.dense()[2:, 2:], visibility.dense())
    assert bool(longer.dense()[2:, :2].all())
    num = longer.num_positions
    assert longer.dense()[:2].int().tolist() == [[1] + [0] * (num - 1), [1, 1] + [0] * (num - 2)]


def test_no_square_mask_is_made_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[slice, slice]] = []
    true_between = Visibility.between

    def between(self: Visibility, queries: slice, keys: slice, *, window: int | None = None) -> Tensor:
        made.append((queries, keys))
        return true_between(self, queries, keys, window=window)

    monkeypatch.setattr(Visibility, "between", between)
    trees = [short_tree(str(n), [n, *[5] * 500], [6] * 300, [7] * 200) for n in range(8)]
    batch = pack(trees)
    assert batch.visibility is not None
    assert batch.visibility.num_positions == 8 * 1001
    blocks = batch.visibility.blocks(block_size=128)
    assert blocks.some_QK.shape == (63, 63)
    assert made == []
    assert batch.visibility.dense().shape == (8008, 8008)
    assert len(made) == 1


def test_a_padded_batch_says_which_places_are_tokens() -> None:
    batch = pad([short_tree("a", [3, 4], [5], [6, 7, 8])], pad_id=0)
    assert not batch.is_packed
    assert batch.visibility is None
    assert batch.token_mask_BT.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.token_mask_BT.dtype == torch.bool


def test_a_batch_moves_whole() -> None:
    batch: TreeBatch = pack([Tree("a", (3,), ((4,),), (False,))]).to(torch.device("meta"))
    assert batch.visibility is not None
    tensors = (
        batch.input_ids_BT,
        batch.token_mask_BT,
        batch.visibility.tree_T,
        batch.visibility.position_T,
        batch.last_R,
    )
    assert {tensor.device.type for tensor in tensors} == {"meta"}
