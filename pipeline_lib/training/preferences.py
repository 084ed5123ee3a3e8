"""Preferences as trees: each prompt once with all its responses, and what people said of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline_lib.schema import Record
from pipeline_lib.text.encode import Encoder, Tree

MISMATCHED = "mismatched:"
"""Prefix of the record id of a prompt with another row's response."""


@dataclass(frozen=True)
class Judgement:
    """What people said of one row's responses."""

    ranks: tuple[int, ...]
    """The place of each response, 1 the best, equal numbers are ties."""
    scores: tuple[float, ...]
    """What people gave each response, higher is better; NaN where the row does not say."""
    is_desirable: tuple[bool, ...]
    """For unpaired losses: the label of a rated response; of a comparison, whether it is among the best."""
    weight: float = 1.0

    @property
    def rewards(self) -> tuple[float, ...]:
        """The scores; minus the ranks where a response has none."""
        if any(math.isnan(score) for score in self.scores):
            return tuple(float(-rank) for rank in self.ranks)
        return self.scores


@dataclass(frozen=True)
class Comparisons:
    """The rows of a preference stage, in their order."""

    trees: tuple[Tree, ...]
    judgements: dict[str, Judgement]
    """By record id."""


def judgement_of(record: Record) -> Judgement:
    """Say of a row's responses what losses need to know."""
    ranks = record.ranks or (1,) * len(record.responses)
    scores = tuple(math.nan if response.score is None else response.score for response in record.responses)
    if record.desirable is not None:
        return Judgement(ranks, scores, (record.desirable,), record.weight)
    return Judgement(ranks, scores, tuple(rank == min(ranks) for rank in ranks), record.weight)


def comparisons_of(records: Iterable[Record], encoder: Encoder, *, with_rated: bool = True) -> Comparisons:
    """Encode the rows that say which response is better, or whether one is good; the others are left out.

    Args:
        records: Rows of one split.
        encoder: How they become token ids.
        with_rated: Take rows with one rated response too, which only unpaired losses can use.
    """
    trees: list[Tree] = []
    judgements: dict[str, Judgement] = {}
    for record in records:
        is_ranked = record.kind == "comparison" and len(set(record.ranks)) > 1  # nothing but ties says nothing
        if is_ranked or (with_rated and record.kind == "rated"):
            tree = encoder.tree(record)
            if not is_ranked:
                tree = replace(tree, prompt_counts=(False,) * len(tree.prompt_ids))
            trees.append(tree)
            judgements[record.id] = judgement_of(record)
    return Comparisons(tuple(trees), judgements)


def mismatched(trees: Sequence[Tree]) -> list[Tree]:
    """Pair each prompt with the first response of the next row, the last with the first row's.

    Rows are taken in the order of their ids, so the pairs do not depend on how they are read. KTO
    estimates its reference point on them (Ethayarajh et al. 2024, section 4.1).
    """
    ordered = sorted(trees, key=lambda tree: tree.record_id)
    return [
        Tree(MISMATCHED + tree.record_id, tree.prompt_ids, other.response_ids[:1], (False,) * len(tree.prompt_ids))
        for tree, other in zip(ordered, [*ordered[1:], *ordered[:1]], strict=True)
    ]
