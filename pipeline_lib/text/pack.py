"""Trees into batches: packed by token budget, the prompt once, then its responses.

Legend: P positions of a batch (rows x columns, flat), N counted tokens, R responses, B rows, T
columns.

A packed batch is one row that holds many trees. A position attends to the positions before it of
its own tree that are prompt or of its own response. What all prompts of a batch begin with (a
system turn) is a trunk that stands there once and is seen by all. Positions count from 0 in every
prompt, and each response goes on from the end of its prompt, so rotary embeddings are those of the
unpacked text. Who sees whom is kept as two numbers a position (`text.visibility`); a mask of T x T
is made only where a model needs one. The padded form holds one (prompt, response) a row and serves
every model.

A counted token is predicted from the position before it: `source_N` says which position that is
(the last prompt position for a response's first token, shared by all K responses).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline_lib.text.encode import Tree
from pipeline_lib.text.visibility import TRUNK, Visibility


@dataclass(frozen=True)
class TreeBatch:
    """Some trees as tensors, packed or padded; both give the same counted tokens in one order."""

    trees: tuple[Tree, ...]
    input_ids_BT: Tensor
    position_ids_BT: Tensor
    token_mask_BT: Tensor
    """True = a token, False = padding; a packed batch has none."""
    visibility: Visibility | None
    """Who sees whom in a packed row; None in a padded batch."""
    source_N: Tensor
    """Flat position from which a counted token is predicted."""
    label_N: Tensor
    """The counted token's id."""
    response_N: Tensor
    """Index of the response that a counted token belongs to."""
    last_R: Tensor
    """Flat position of each response's last token."""

    @property
    def is_packed(self) -> bool:
        """True: one row of prompt trees; False: a row per response."""
        return self.visibility is not None

    @property
    def num_responses(self) -> int:
        """R, over all trees, in tree order."""
        return int(self.last_R.numel())

    @property
    def num_counted(self) -> int:
        """N, the number of counted tokens."""
        return int(self.label_N.numel())

    @cached_property
    def lengths_R(self) -> Tensor:
        """Counted tokens of each response."""
        return torch.bincount(self.response_N, minlength=self.num_responses)

    def sum_by_response(self, values_N: Tensor) -> Tensor:
        """Sum a figure per counted token into one per response, `(R,)`; differentiable."""
        zeros_R = values_N.new_zeros(self.num_responses)
        return zeros_R.index_add(0, self.response_N, values_N)

    def to(self, device: torch.device) -> TreeBatch:
        """Return the batch with its tensors on a device."""
        if self.input_ids_BT.device == device:
            return self
        moved = {
            name: getattr(self, name).to(device)
            for name in (
                "input_ids_BT",
                "position_ids_BT",
                "token_mask_BT",
                "source_N",
                "label_N",
                "response_N",
                "last_R",
            )
        }
        visibility = None if self.visibility is None else self.visibility.to(device)
        return replace(self, visibility=visibility, **moved)


def bins(trees: Sequence[Tree], *, token_budget: int, shared: int = 0) -> list[list[int]]:
    """Assign trees to batches by first-fit decreasing under a token budget.

    Args:
        trees: The trees of one optimizer step.
        token_budget: Tokens of a batch, at most; a tree above it gets a batch of its own.
        shared: Tokens that every tree begins with and that stand once in a batch: `trunk_length`
            of all trees, which no batch of some of them has less of.

    Returns:
        Indices into `trees`, one list a batch; every index exactly once, deterministic.
    """
    filled: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(trees)), key=lambda i: (-trees[i].num_tokens, i)):
        size = trees[index].num_tokens
        for place, (used, members) in enumerate(filled):
            if used + size - shared <= token_budget:
                filled[place] = (used + size - shared, [*members, index])
                break
        else:
            filled.append((size, [index]))
    return [sorted(members) for _, members in filled]


def trunk_length(trees: Sequence[Tree]) -> int:
    """Return how many first prompt tokens all trees share and none counts.

    Every prompt keeps at least one token of its own, from which its responses are predicted.
    """
    if len(trees) < 2:
        return 0
    length = 0
    for column in zip(*(tree.prompt_ids[:-1] for tree in trees), strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    first_counted = min((tree.prompt_counts.index(True) for tree in trees if any(tree.prompt_counts)), default=length)
    return min(length, first_counted)


def pack(trees: Sequence[Tree]) -> TreeBatch:
    """Pack trees into one row; what all prompts begin with stands there once (see the module's text)."""
    trunk = trunk_length(trees)
    ids = list(trees[0].prompt_ids[:trunk])
    positions = list(range(trunk))
    tree_of = [TRUNK] * trunk
    branch_of = [0] * trunk  # 0 for the prompt, else 1 + the response's index in its tree
    plan = _Counted()
    for tree_index, tree in enumerate(trees):
        own = tree.prompt_ids[trunk:]
        shift = len(ids) - trunk  # flat place of a prompt token is its offset plus this, after the trunk
        ids += own
        positions += range(trunk, len(tree.prompt_ids))
        tree_of += [tree_index] * len(own)
        branch_of += [0] * len(own)
        plan.add_prompt(tree, trunk=trunk, shift=shift)
        last_of_prompt = len(ids) - 1
        for branch, response in enumerate(tree.response_ids):
            plan.add_response(response, before=last_of_prompt, first=len(ids))
            positions += range(len(tree.prompt_ids), len(tree.prompt_ids) + len(response))
            ids += response
            tree_of += [tree_index] * len(response)
            branch_of += [branch + 1] * len(response)
    visibility = Visibility(torch.tensor(tree_of), torch.tensor(branch_of), torch.tensor(positions))
    return plan.batch(tuple(trees), torch.tensor([ids]), torch.tensor([positions]), visibility=visibility)


def pad(trees: Sequence[Tree], *, pad_id: int) -> TreeBatch:
    """Lay trees out as one right-padded row per response, for models without custom masks."""
    rows = [(tree, ids) for tree in trees for ids in (tree.response_ids or ((),))]
    width = max(len(tree.prompt_ids) + len(ids) for tree, ids in rows)
    input_ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    plan = _Counted()
    row = 0
    for tree in trees:
        plan.add_prompt(tree, trunk=0, shift=row * width)
        for ids in tree.response_ids or ((),):
            whole = (*tree.prompt_ids, *ids)
            input_ids_BT[row, : len(whole)] = torch.tensor(whole)
            mask_BT[row, : len(whole)] = True
            first = row * width + len(tree.prompt_ids)
            if ids:
                plan.add_response(ids, before=first - 1, first=first)
            row += 1
    positions_BT = torch.arange(width).expand(len(rows), width).contiguous()
    return plan.batch(tuple(trees), input_ids_BT, positions_BT, mask_BT=mask_BT)


class _Counted:
    """Collects which tokens count, from where each is predicted, and where responses end."""

    def __init__(self) -> None:
        self.source: list[int] = []
        self.label: list[int] = []
        self.response: list[int] = []
        self.last: list[int] = []

    def add_prompt(self, tree: Tree, *, trunk: int, shift: int) -> None:
        """Count the earlier assistant turns of a tree, as part of its first response.

        Args:
            tree: The tree.
            trunk: Prompt tokens that stand at their own offset, shared with other trees.
            shift: Added to a later prompt token's offset, gives its flat position.
        """
        if not any(tree.prompt_counts):
            return
        assert len(tree.response_ids) == 1, "earlier turns count only where there is one response"
        for offset, (token, counts) in enumerate(zip(tree.prompt_ids, tree.prompt_counts, strict=True)):
            if counts and offset > 0:
                before = offset - 1
                self._count(before if before < trunk else before + shift, token, len(self.last))

    def add_response(self, ids: tuple[int, ...], *, before: int, first: int) -> None:
        """Count every token of a response; the first is predicted from position `before`."""
        for offset, token in enumerate(ids):
            self._count(before if offset == 0 else first + offset - 1, token, len(self.last))
        self.last.append(first + len(ids) - 1)

    def _count(self, source: int, token: int, response: int) -> None:
        self.source.append(source)
        self.label.append(token)
        self.response.append(response)

    def batch(
        self,
        trees: tuple[Tree, ...],
        input_ids_BT: Tensor,
        positions_BT: Tensor,
        *,
        mask_BT: Tensor | None = None,
        visibility: Visibility | None = None,
    ) -> TreeBatch:
        """Make the batch of what was collected."""
        if mask_BT is None:
            mask_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
        source_N, label_N, response_N, last_R = (
            torch.tensor(values, dtype=torch.long) for values in (self.source, self.label, self.response, self.last)
        )
        return TreeBatch(trees, input_ids_BT, positions_BT, mask_BT, visibility, source_N, label_N, response_N, last_R)
