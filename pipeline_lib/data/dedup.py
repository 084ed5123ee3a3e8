"""What only the whole set shows: duplicates, contradicting comparisons, ties.

A row is represented by a few short digests, so a million rows fit into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.schema import Origin, Record
from pipeline_lib.text.normalize import comparison_key
from pipeline_lib.validation import Frozen


class DedupConfig(Frozen):
    """Which steps over the whole set to take."""

    exact: bool = True
    """Keep the first of rows that look the same."""
    contradictions: bool = True
    """Refuse comparisons that say the opposite of each other, both of them."""
    ties: Literal["drop", "keep"] = "drop"
    """What becomes of comparisons that prefer nothing."""


@dataclass(frozen=True, slots=True)
class RowKeys:
    """What the steps over the whole set need of a row."""

    content: bytes
    """Digest of prompt, responses and their order of preference."""
    preferences: tuple[tuple[bytes, bytes], ...]
    """For each pair of unequal rank, the digests of `better > worse` and of its reverse."""
    is_tie: bool
    where: str
    """Place and line, for messages."""


def digest(*parts: str) -> bytes:
    """Return 16 bytes that stand for a sequence of texts."""
    state = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        state.update(len(encoded).to_bytes(8, "big") + encoded)
    return state.digest()[:16]


def prompt_key(record: Record) -> bytes:
    """Return the digest of a prompt as a person would compare it."""
    return digest(*(part for turn in record.messages for part in (turn.role, comparison_key(turn.content))))


def describe_place(origin: Origin) -> str:
    """Return where a row came from, e.g. `data/hh.jsonl:12`."""
    place = origin.place or origin.source
    return place if origin.line is None else f"{place}:{origin.line}"


def row_keys(record: Record) -> RowKeys:
    """Return the digests of a record."""
    prompt = prompt_key(record).hex()
    texts = [comparison_key(answer.content) for answer in record.responses]
    ranked = sorted(zip(record.ranks or (1,) * len(texts), texts, strict=True))
    pairs = permutations(ranked, 2)
    return RowKeys(
        content=digest(record.kind, prompt, *(f"{rank}:{text}" for rank, text in ranked)),
        preferences=tuple(
            (digest(prompt, better, worse), digest(prompt, worse, better))
            for (rank, better), (other_rank, worse) in pairs
            if rank < other_rank
        ),
        is_tie=len(texts) >= 2 and len(set(record.ranks)) == 1,
        where=describe_place(record.origin),
    )


def find_duplicates(rows: Sequence[RowKeys], alive: Iterable[int]) -> dict[int, Refusal]:
    """Return the rows that look like an earlier one, by index.

    Args:
        rows: Every row's digests.
        alive: Indices of the rows that count, in order.
    """
    first_by_content: dict[bytes, int] = {}
    refused: dict[int, Refusal] = {}
    for index in alive:
        first = first_by_content.setdefault(rows[index].content, index)
        if first != index:
            refused[index] = Refusal("E_DUPLICATE", f"the same row as {rows[first].where}")
    return refused


def find_contradictions(rows: Sequence[RowKeys], alive: Iterable[int]) -> dict[int, Refusal]:
    """Return the comparisons of which another one says the opposite, by index."""
    counted = list(alive)
    claimed_by: dict[bytes, int] = {}
    for index in counted:
        for claim, _ in rows[index].preferences:
            claimed_by.setdefault(claim, index)
    refused: dict[int, Refusal] = {}
    for index in counted:
        other = next((claimed_by[reverse] for _, reverse in rows[index].preferences if reverse in claimed_by), None)
        if other is not None:
            reason = f"{rows[other].where} prefers the opposite" if other != index else "the row contradicts itself"
            refused[index] = Refusal("E_CONTRADICTION", reason)
    return refused


def find_ties(rows: Sequence[RowKeys], alive: Iterable[int]) -> dict[int, Refusal]:
    """Return the comparisons all of whose responses have one rank, by index."""
    return {
        index: Refusal("E_TIE", "all responses have the same rank, nothing is preferred")
        for index in alive
        if rows[index].is_tie
    }
