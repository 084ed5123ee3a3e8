"""One split for all stages, by prompt: what a prompt is used for is a function of the prompt alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from pipeline_lib.data.dedup import describe_place, digest, prompt_key
from pipeline_lib.errors import DataError
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import Record, Split, prompt_id
from pipeline_lib.text.normalize import comparison_key
from pipeline_lib.validation import Frozen

_OPENING_WORDS = 4
_HASH_DIGITS = 15


class SplitFractions(Frozen):
    """The share of prompts each use gets; the shares add up to 1."""

    sft: float = Field(default=0.4, ge=0, le=1)
    """Demonstrations for supervised fine-tuning."""
    reward: float = Field(default=0.25, ge=0, le=1)
    """Comparisons for the reward model."""
    policy: float = Field(default=0.2, ge=0, le=1)
    """Prompts and comparisons for the policy stages."""
    reward_test: float = Field(default=0.05, ge=0, le=1)
    """Comparisons that measure the reward model."""
    gate: float = Field(default=0.1, ge=0, le=1)
    """Prompts that only the evaluation before the gate sees."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = sum(self.by_split().values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the fractions add up to {total:g}, not 1")
        return self

    def by_split(self) -> dict[Split, float]:
        """Return the fractions by split, in the order in which the hash range is cut."""
        return {split: float(getattr(self, split.value)) for split in Split}


class SplitConfig(Frozen):
    """How prompts are divided."""

    fractions: SplitFractions = SplitFractions()
    """Share of the prompts for each use."""
    seed: int = 0
    """Another seed divides the prompts in another way."""
    by_opening: bool = True
    """Keep dialogues that begin with the same question together, however they go on."""


@dataclass(frozen=True, slots=True)
class SplitKeys:
    """What ties a row to others."""

    links: tuple[bytes, ...]
    """Rows that share one of these share a split."""
    anchor: bytes
    """By which the row's component is named."""


def split_keys(record: Record, config: SplitConfig) -> SplitKeys:
    """Return what a record has in common with those that must share its split."""
    group, prompt = digest("group", record.group), prompt_key(record)
    links = [group, prompt]
    opening = comparison_key(next(turn.content for turn in record.messages if turn.role == "user"))
    is_telling = len(opening.split()) >= _OPENING_WORDS
    opening_key = digest("opening", opening) if config.by_opening and is_telling else prompt
    links.append(opening_key)
    has_own_group = record.group != prompt_id(record.messages)
    return SplitKeys(tuple(links), group if has_own_group else opening_key)


def assign_splits(rows: Sequence[SplitKeys], config: SplitConfig) -> list[Split]:
    """Return each row's split.

    Rows are joined into components by whatever they share; a component's name is its smallest
    anchor, and the hash of name and seed decides. Other rows therefore change nothing, unless they
    join two components.

    Args:
        rows: Each row's keys.
        config: Fractions and seed.
    """
    parents: dict[bytes, bytes] = {}
    for row in rows:
        for link in row.links:
            _join(parents, row.links[0], link)
    names: dict[bytes, bytes] = {}
    for row in rows:
        root = _root(parents, row.links[0])
        names[root] = min(names.get(root, row.anchor), row.anchor)
    chosen = {root: split_of(name.hex(), config) for root, name in names.items()}
    return [chosen[_root(parents, row.links[0])] for row in rows]


def split_of(name: str, config: SplitConfig) -> Split:
    """Return the split of a component by the hash of its name."""
    position = int(sha256_json([config.seed, "split", name])[:_HASH_DIGITS], 16) / 16**_HASH_DIGITS
    end = 0.0
    wanted = [(split, fraction) for split, fraction in config.fractions.by_split().items() if fraction > 0]
    for split, fraction in wanted:
        end += fraction
        if position < end:
            return split
    return wanted[-1][0]


class DisjointCheck:
    """Watches rows go by and refuses a prompt in two splits."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[Split, str]] = {}

    def add(self, record: Record) -> None:
        """Look at one row.

        Raises:
            DataError: Its prompt, compared as a person would, was seen in another split.
        """
        assert record.split is not None, f"{record.id} has no split"
        where = describe_place(record.origin)
        split, first = self._seen.setdefault(prompt_key(record), (record.split, where))
        if split is not record.split:
            raise DataError(
                f"one prompt is in two splits: {first} in {split.value}, {where} in {record.split.value}",
                next_step="divide the rows with the filter stage; a prompt may serve one purpose only",
            )


def check_disjoint(records: Iterable[Record]) -> None:
    """Check that every prompt is in exactly one split.

    Raises:
        DataError: Naming the two rows with one prompt.
    """
    check = DisjointCheck()
    for record in records:
        check.add(record)


def _root(parents: dict[bytes, bytes], key: bytes) -> bytes:
    root = parents.setdefault(key, key)
    while parents[root] != root:
        root = parents[root]
    while parents[key] != root:
        parents[key], key = root, parents[key]
    return root


def _join(parents: dict[bytes, bytes], one: bytes, other: bytes) -> None:
    first, second = sorted((_root(parents, one), _root(parents, other)))
    parents[second] = first
