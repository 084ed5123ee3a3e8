"""Attention over prompt trees: part by part on CPU, block by block (FlexAttention) on CUDA.

Legend: B rows, H heads, T positions, K keys (virtual tokens before the row included), D head width.

One attention function is given to transformers under a name of ours. Where a forward brings
`tree_masks` it computes the trees' attention; anywhere else (padded rows, sampling) it is
transformers' own. On CPU each tree attends by itself, a large one response by response, so that the
cost grows with what is seen and not with the squared row; on CUDA a block mask skips what no tree sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline_lib.text.visibility import TRUNK, Visibility

TREE_ATTENTION = "prompt_trees"
"""The name of our attention among those of transformers."""
BLOCK_SIZE = 128
"""Positions of a block of FlexAttention's mask."""


def register_tree_attention() -> None:
    """Make our attention known to transformers; calling it again changes nothing."""
    AttentionInterface.register(TREE_ATTENTION, attention_of_trees)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)


class TreeMasks:
    """The masks of one packed row, each made at its first use and shared by all layers."""

    def __init__(self, visibility: Visibility) -> None:
        """Take who sees whom in the row."""
        self.visibility = visibility
        self._by_part: dict[tuple[int, int | None, torch.dtype], list[Tensor | None]] = {}
        self._blocks: dict[tuple[int, int | None], BlockMask] = {}
        self._behind: TreeMasks | None = None

    def for_queries(self, num: int) -> TreeMasks:
        """Return the masks of a row with this many positions, of which the first may be virtual tokens."""
        extra = num - self.visibility.num_positions
        if extra == 0:
            return self
        if self._behind is None or self._behind.visibility.num_positions != num:
            self._behind = TreeMasks(self.visibility.behind(extra))
        return self._behind

    def by_part(self, *, prefix: int, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """Return the additive mask of each part of the row.

        Its keys are the virtual tokens, the parts before it that it sees, and the part itself. None
        stands for plain causal attention, which needs no mask.
        """
        key = (prefix, window, dtype)
        if key not in self._by_part:
            self._by_part[key] = self._make_by_part(prefix, window, dtype)
        return self._by_part[key]

    def _make_by_part(self, prefix: int, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        visibility = self.visibility
        masks: list[Tensor | None] = []
        starts = [0, *accumulate(part.size for part in visibility.parts)]
        places = [slice(start, end) for start, end in pairwise(starts)]
        for part, queries in zip(visibility.parts, places, strict=True):
            if part.is_causal and not (prefix or part.before) and window is None:
                masks.append(None)
                continue
            keys = [places[index] for index in part.before] + [queries]
            seen = torch.cat([visibility.between(queries, stretch, window=window) for stretch in keys], dim=1)
            if prefix:
                seen = torch.cat((seen.new_ones(part.size, prefix), seen), dim=1)
            masks.append(torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))[None, None])
        return masks

    def blocks(self, *, prefix: int, window: int | None) -> BlockMask:
        """Return FlexAttention's mask, made from the two vectors without a T x T mask in memory."""
        key = (prefix, window)
        if key not in self._blocks:
            self._blocks[key] = block_mask(self.visibility, prefix=prefix, window=window)
        return self._blocks[key]


def block_mask(visibility: Visibility, *, prefix: int = 0, window: int | None = None) -> BlockMask:
    """Build the block mask of a packed row.

    Args:
        visibility: Who sees whom in the row.
        prefix: Keys before the row that every position sees (virtual tokens).
        window: Tokens that a position looks back at, itself included; None: all.
    """
    blocks = visibility.blocks(block_size=BLOCK_SIZE, prefix=prefix, window=window)
    tree_T, branch_T, position_T = visibility.tree_T, visibility.branch_T, visibility.position_T

    def is_seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        place = (key - prefix).clamp(min=0)
        seen = (query >= place) & ((tree_T[query] == tree_T[place]) | (tree_T[place] == TRUNK))
        seen = seen & ((branch_T[place] == 0) | (branch_T[query] == branch_T[place]))
        if window is not None:
            seen = seen & (position_T[query] - position_T[place] < window)
        return seen | (key < prefix)

    length = visibility.num_positions
    return BlockMask.from_kv_blocks(
        *_indices(blocks.some_QK), *_indices(blocks.all_QK),
        BLOCK_SIZE=BLOCK_SIZE, mask_mod=is_seen, seq_lengths=(length, prefix + length),
    )  # fmt: skip


def _indices(wanted_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row of blocks needs and, first in the row, which."""
    order_QK = torch.argsort(wanted_QK.int(), dim=1, descending=True, stable=True).to(torch.int32)
    return wanted_QK.sum(1).to(torch.int32)[None, None], order_QK[None, None].contiguous()


def attention_of_trees(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_masks: TreeMasks | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within prompt trees, or as transformers does where there are none.

    Args:
        module: The attention layer.
        query: `(B, H, T, D)`.
        key: `(B, H / groups, K, D)`; the first `K - T` are virtual tokens of a cache, which all see.
        value: As `key`.
        attention_mask: Transformers' mask, used only without `tree_masks`.
        tree_masks: The row's trees; B is then 1. Positions in front of them are seen by all.
        dropout: Of the attention weights.
        scaling: Of the scores; None: 1 / sqrt(D).
        **kwargs: What else the layer says, `sliding_window` and `softcap` among it.

    Returns:
        `(output, None)`, output `(B, T, H, D)`.

    Raises:
        NotImplementedError: The layer wants a bias or sinks, which trees do not have.
    """
    softcap: float | None = kwargs.get("softcap")
    if tree_masks is None:
        if softcap is not None:
            return _capped(query, key, value, attention_mask, scaling, softcap, dropout), None
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    refuse_unknown(kwargs, attention="attention over prompt trees")
    tree_masks = tree_masks.for_queries(query.shape[2])
    how: dict[str, Any] = {
        "window": _window(kwargs.get("sliding_window"), tree_masks.visibility), "scaling": scaling, "softcap": softcap,
    }  # fmt: skip
    if query.is_cuda and dropout == 0.0:
        return _block_by_block(query, key, value, tree_masks, **how), None
    return _part_by_part(query, key, value, tree_masks, **how, dropout=dropout), None


def refuse_unknown(kwargs: Mapping[str, Any], *, attention: str) -> None:
    """Refuse a layer that wants what an attention of ours does not compute.

    Args:
        kwargs: What the layer says.
        attention: Its name, for the error.

    Raises:
        NotImplementedError: The layer wants a bias or sinks.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{attention} has no {unknown[0]}")


def _window(sliding_window: int | None, visibility: Visibility) -> int | None:
    """Return the layer's window where it hides something from some position."""
    if sliding_window is None or sliding_window >= visibility.longest_text:
        return None
    return sliding_window


def _block_by_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_masks: TreeMasks,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    blocks = tree_masks.blocks(prefix=key.shape[2] - query.shape[2], window=window)
    return flex(query, key, value, blocks, scaling=scaling, softcap=softcap)


def _part_by_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree_masks: TreeMasks,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    prefix, parts = key.shape[2] - query.shape[2], tree_masks.visibility.parts
    masks = tree_masks.by_part(prefix=prefix, window=window, dtype=query.dtype)
    sizes = [part.size for part in parts]
    # Split, not slices: the backward of a split is one copy, that of each slice is the whole row.
    queries = query.split(sizes, dim=2)
    # What is virtual comes first, so that a part's keys are at its index + 1.
    keys, values = (whole.split([prefix, *sizes], dim=2) for whole in (key, value))
    outputs = []
    for index, (part, query_p, mask) in enumerate(zip(parts, queries, masks, strict=True)):
        key_p, value_p = keys[index + 1], values[index + 1]
        if prefix or part.before:
            seen = (0, *(before + 1 for before in part.before), index + 1)
            key_p, value_p = (torch.cat([split[place] for place in seen], dim=2) for split in (keys, values))
        outputs.append(_attend(query_p, key_p, value_p, mask, scaling, softcap, dropout))
    return torch.cat(outputs, dim=1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attend with an additive mask, causally without one; `(B, T, H, D)`."""
    if softcap is not None:
        return _capped(query, key, value, mask, scaling, softcap, dropout)
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attend with scores capped by `softcap * tanh(score / softcap)`, as Gemma 2 does; `(B, T, H, D)`."""
    groups = query.shape[1] // key.shape[1]
    score = query @ repeat_kv(key, groups).transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    score = softcap * torch.tanh(score / softcap)
    if mask is None and query.shape[2] > 1:
        length = query.shape[2]
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - length)
    if mask is not None:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min) if mask.dtype == torch.bool else score + mask
    weight = torch.softmax(score, dim=-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(query.dtype)
    weight = nn.functional.dropout(weight, p=dropout)
    output: Tensor = weight @ repeat_kv(value, groups)
    return output.transpose(1, 2)


def flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attend with FlexAttention under a block mask, compiled on CUDA; `(B, T, H, D)`."""
    run = _compiled_flex() if query.is_cuda else flex_attention
    output: Tensor = run(
        query, key, value, score_mod=None if softcap is None else partial(_cap_score, softcap), block_mask=blocks,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def _cap_score(softcap: float, score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
    capped: Tensor = softcap * torch.tanh(score / softcap)
    return capped


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)
