"""Who sees whom in a packed row of prompt trees, in two numbers a position.

Legend: T positions of the row, Q and K blocks of positions.

A position sees, at or before its own place: the trunk, the prompt of its tree, and its own branch
(response). In a row of trees these are at most three stretches of places, so that the mask, its
blocks and the attention tree by tree all follow from two vectors, and T x T is never needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TRUNK = -1
"""Tree number of the tokens that all trees of a row share."""
PROMPT = 0
"""Branch number of a tree's prompt; its responses count from 1."""
PAIRS_WORTH_A_PART = 9000
"""Pairs of places that attention must be spared to be worth one more call, on a CPU; see docs/methods/batches.md."""


@dataclass(frozen=True)
class Blocks:
    """Which blocks of keys each block of queries needs: the sparse form of a mask."""

    some_QK: Tensor
    """True where some pair of the block is visible and some is not."""
    all_QK: Tensor
    """True where all pairs are visible."""


@dataclass(frozen=True)
class Part:
    """Neighbouring places of a row that attend together: to themselves, and wholly to some parts before them."""

    size: int
    before: tuple[int, ...]
    """Indices of the parts that all its places see: the trunk, its prompt."""
    is_causal: bool
    """Whether each place sees all of the part up to itself; False where a whole tree branches inside."""


@dataclass(frozen=True)
class Visibility:
    """The mask of a packed row. Trees stand one after the other, in each the prompt first."""

    tree_T: Tensor
    """Number of the tree, rising by 1 along the row; `TRUNK` for what all trees share, which stands first."""
    branch_T: Tensor
    """`PROMPT`, or 1 + the index of the response in its tree."""
    position_T: Tensor
    """Place in the unpacked text, from 0; a sliding window is measured in it."""

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of the trunk (0 where there is none) and of each tree, in order."""
        return tuple(torch.bincount(self.tree_T - TRUNK).tolist())

    @property
    def num_positions(self) -> int:
        """T."""
        return int(self.tree_T.numel())

    @cached_property
    def longest_text(self) -> int:
        """Tokens of the longest unpacked text."""
        return int(self.position_T.max()) + 1

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Return the row as parts, in order: the trunk, then each tree.

        A tree with several responses becomes its prompt and its responses, each a part, where
        that spares enough of the pairs of places which do not see each other.
        """
        trunk = self.sizes[0]
        parts = [Part(trunk, (), is_causal=True)] if trunk else []
        shared = (0,) if trunk else ()
        branches = self.branch_T.split(list(self.sizes))[1:]
        for size, branch in zip(self.sizes[1:], branches, strict=True):
            prompt, *responses = torch.bincount(branch).tolist()
            lengths = [length for length in responses if length]
            together = sum(length * (prompt + length) for length in lengths) + prompt * prompt // 2
            if len(lengths) <= 1:
                parts.append(Part(size, shared, is_causal=True))
            elif size * size - together < len(lengths) * PAIRS_WORTH_A_PART:
                parts.append(Part(size, shared, is_causal=False))
            else:
                seen = shared
                if prompt:
                    seen = (*shared, len(parts))
                    parts.append(Part(prompt, shared, is_causal=True))
                parts += [Part(length, seen, is_causal=True) for length in lengths]
        return tuple(parts)

    def dense(self, *, window: int | None = None) -> Tensor:
        """Return the mask as bool `(T, T)`, True = the row's position sees the column's.

        Args:
            window: Tokens that a position looks back at, itself included; None: all.
        """
        everything = slice(0, self.num_positions)
        return self.between(everything, everything, window=window)

    def between(self, queries: slice, keys: slice, *, window: int | None = None) -> Tensor:
        """Return the part of the mask for some places of queries and keys, bool."""
        tree_Q, branch_Q, position_Q = self.tree_T[queries], self.branch_T[queries], self.position_T[queries]
        tree_K, branch_K, position_K = self.tree_T[keys], self.branch_T[keys], self.position_T[keys]
        device = self.tree_T.device
        place_Q = torch.arange(queries.start, queries.stop, device=device)
        place_K = torch.arange(keys.start, keys.stop, device=device)
        seen_QK = place_Q[:, None] >= place_K[None, :]
        seen_QK &= (tree_Q[:, None] == tree_K[None, :]) | (tree_K[None, :] == TRUNK)
        seen_QK &= (branch_K[None, :] == PROMPT) | (branch_Q[:, None] == branch_K[None, :])
        if window is not None:
            seen_QK &= position_Q[:, None] - position_K[None, :] < window
        return seen_QK

    def blocks(self, *, block_size: int, prefix: int = 0, window: int | None = None) -> Blocks:
        """Return which blocks of the mask are empty, partly visible and wholly visible.

        Costs T x (T / block_size) numbers.

        Args:
            block_size: Positions of a block.
            prefix: Keys before the row that every position sees (virtual tokens).
            window: Tokens that a position looks back at, itself included; None: all.
        """
        length = self.num_positions
        num_q, num_k = -(-length // block_size), -(-(prefix + length) // block_size)
        device = self.tree_T.device
        block_start_K = torch.arange(num_k, device=device) * block_size
        seen_TK = torch.zeros(length, num_k, dtype=torch.long, device=device)
        for start_T, end_T in self._stretches(prefix, window):
            first_TK = torch.maximum(start_T[:, None], block_start_K[None, :])
            last_TK = torch.minimum(end_T[:, None], block_start_K[None, :] + block_size)
            seen_TK += (last_TK - first_TK).clamp(min=0)
        padding = num_q * block_size - length
        count_QK = torch.nn.functional.pad(seen_TK, (0, 0, 0, padding)).view(num_q, block_size, num_k).sum(1)
        all_QK = count_QK == block_size * block_size
        return Blocks((count_QK > 0) & ~all_QK, all_QK)

    def _stretches(self, prefix: int, window: int | None) -> list[tuple[Tensor, Tensor]]:
        """Return the stretches of places, `start <= place < end`, that each position sees."""
        place_T = torch.arange(self.num_positions, device=self.tree_T.device)
        is_prompt_T = self.branch_T == PROMPT
        is_trunk_T = self.tree_T == TRUNK
        trunk_end_T = torch.where(is_trunk_T, place_T + 1, torch.full_like(place_T, self.sizes[0]))
        new_tree_T = torch.ones_like(is_trunk_T)
        new_tree_T[1:] = self.tree_T[1:] != self.tree_T[:-1]
        new_branch_T = new_tree_T.clone()
        new_branch_T[1:] |= self.branch_T[1:] != self.branch_T[:-1]
        tree_start_T = torch.where(new_tree_T, place_T, 0).cummax(0).values
        branch_start_T = torch.where(new_branch_T, place_T, 0).cummax(0).values
        prompt_length_T = torch.zeros(len(self.sizes), dtype=torch.long, device=place_T.device)
        prompt_length_T = prompt_length_T.index_add(0, self.tree_T - TRUNK, is_prompt_T.long())[self.tree_T - TRUNK]
        prompt_end_T = torch.where(is_prompt_T, place_T + 1, tree_start_T + prompt_length_T)
        nothing_T = torch.zeros_like(place_T)
        trunk = (nothing_T, trunk_end_T)
        prompt = (tree_start_T, torch.where(is_trunk_T, tree_start_T, prompt_end_T))
        branch = (branch_start_T, torch.where(is_prompt_T, branch_start_T, place_T + 1))
        if window is not None:
            oldest_T = self.position_T - window + 1  # in places of the unpacked text
            trunk = (torch.maximum(trunk[0], oldest_T), trunk[1])
            tree_shift_T = tree_start_T - self.position_T[tree_start_T]
            prompt = (torch.maximum(prompt[0], oldest_T + tree_shift_T), prompt[1])
            branch_shift_T = branch_start_T - self.position_T[branch_start_T]
            branch = (torch.maximum(branch[0], oldest_T + branch_shift_T), branch[1])
        stretches = [(start_T + prefix, end_T + prefix) for start_T, end_T in (trunk, prompt, branch)]
        if prefix:
            stretches.append((nothing_T, torch.full_like(nothing_T, prefix)))
        return stretches

    def behind(self, num: int) -> Visibility:
        """Return the row with some more tokens in front that all see, as part of the trunk."""
        grown = torch.arange(num, device=self.tree_T.device)
        return Visibility(
            torch.cat((torch.full_like(grown, TRUNK), self.tree_T)),
            torch.cat((torch.full_like(grown, PROMPT), self.branch_T)),
            torch.cat((grown, self.position_T + num)),
        )

    def to(self, device: torch.device) -> Visibility:
        """Return the same on a device."""
        return Visibility(self.tree_T.to(device), self.branch_T.to(device), self.position_T.to(device))
