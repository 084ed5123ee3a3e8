"""The rows of `ppo_learns`' part about a language model, and how they are shared out.

`documentation` are questions about the running interpreter's standard library with its documentation as
the answer, as in the demo: they need no file. `hh` are people's pairwise choices (Anthropic's HH-RLHF), from a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.data.sources.pydoc import Pydoc
from pipeline_lib.errors import DataError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.schema import Record
from pipeline_lib.validation import Frozen

Kind = Literal["documentation", "hh"]
HH_FILE = "helpful-base.jsonl.gz"


class Sizes(Frozen):
    """How many rows each use gets."""

    sft: int = Field(72, ge=1)
    """Few, so that the start answers now as documentation does and now as a chat model: there is much to gain."""
    reward: int = Field(120, ge=2)
    """Of each of the two reward models."""
    test: int = Field(96, ge=2)
    policy: int = Field(320, ge=2)
    """At most: what the others leave."""


@dataclass(frozen=True)
class Rows:
    """Rows of each use; no group (a function with its sibling, a conversation) is in two."""

    sft: list[Record]
    proxy: list[Record]
    heldout: list[Record]
    test: list[Record]
    policy: list[Record]


def choose_rows(kind: Kind, sizes: Sizes, *, folder: Path, seed: int) -> Rows:
    """Read rows and share them out, whole groups at a time.

    Args:
        kind: Which rows.
        sizes: How many for what.
        folder: Where `hh` is.
        seed: Of the shares.

    Raises:
        DataError: There are too few, or no file in the folder.
    """
    rows, group_of = _documentation(seed) if kind == "documentation" else _hh(folder)
    by_group: dict[str, list[Record]] = {}
    for row in rows:
        by_group.setdefault(group_of(row), []).append(row)
    order = iter(sorted(by_group, key=lambda group: derive_seed(seed, "share", group)))
    wanted = {
        "sft": sizes.sft, "proxy": sizes.reward, "heldout": sizes.reward, "test": sizes.test, "policy": sizes.policy
    }  # fmt: skip
    shares: dict[str, list[Record]] = {}
    for name, count in wanted.items():
        share: list[Record] = []
        while len(share) < count and (group := next(order, None)) is not None:
            share += by_group[group]
        shares[name] = share[:count]
    if len(shares["policy"]) < 2:
        raise DataError(
            f"{len(rows)} rows are too few for {sum(wanted.values()) - sizes.policy} and some for the policy",
            next_step="take smaller sizes, or more rows",
        )
    return Rows(**shares)


GroupOf = Callable[[Record], str]


def _documentation(seed: int) -> tuple[list[Record], GroupOf]:
    source = Pydoc(phrasings=1, max_words=24, seed=seed)
    found = source.rows(LocalPlaces(), lambda _: None)
    rows = [row for row in found if isinstance(row, Record) and len(row.responses) == 1]
    return rows, lambda row: row.group


def _hh(folder: Path) -> tuple[list[Record], GroupOf]:
    source = Jsonl(path=str(folder / HH_FILE), license="MIT")
    rows = [row for row in source.rows(LocalPlaces(), lambda _: None) if isinstance(row, Record)]
    # The file has one conversation several times, each time with more turns.
    return rows, lambda row: row.messages[0].content
