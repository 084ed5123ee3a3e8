"""Which rows a training stage takes: by tag, a part of the prompts, and a share of others mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from pipeline_lib.data.split import SplitConfig, split_keys
from pipeline_lib.hashing import derive_seed
from pipeline_lib.schema import Record
from pipeline_lib.validation import Frozen


class RowSelection(Frozen):
    """Rows by tag. LLaMA-2's safety reward model is `{tags: [safe], mix_tags: [helpful], mix_frac: 0.1}`."""

    tags: tuple[str, ...] = ()
    """Rows with one of these tags; empty: every row."""
    mix_tags: tuple[str, ...] = ()
    """Which other rows are mixed in: those with one of these tags; empty: any."""
    mix_frac: float = Field(0.0, ge=0, lt=1)
    """Share of the rows mixed in among all; where there are too few, all of them are."""
    part: tuple[int, int] | None = None
    """[i, n]: train on the i-th of n parts of the prompts alone, so that models with different parts share none
    (a reward model and one that is held out); null: on all."""

    @model_validator(mode="after")
    def _part_is_there(self) -> Self:
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"part = {list(self.part)}: [i, n] is the i-th of n parts, i from 1 to n")
        return self

    @model_validator(mode="after")
    def _others_exist(self) -> Self:
        if self.mix_frac > 0 and not self.tags:
            raise ValueError("mix_frac mixes other rows into those with `tags`, and no tags are named")
        if self.mix_tags and self.mix_frac == 0:
            raise ValueError("mix_tags are named but mix_frac is 0")
        return self

    def own(self, rows: Sequence[Record]) -> list[Record]:
        """Return the rows with one of the tags, in their order."""
        return [row for row in rows if not self.tags or _has(row, self.tags)]

    def mixed(self, rows: Sequence[Record], *, seed: int) -> list[Record]:
        """Return the rows of the part with one of the tags and the share of others, in their order.

        Of N own rows and the share f, round(N f / (1 - f)) others are chosen by the seed.
        """
        rows = [row for row in rows if self._has_part(row)]
        own = self.own(rows)
        num_others = round(len(own) * self.mix_frac / (1 - self.mix_frac))
        taken = {row.id for row in own}
        others = [row for row in rows if row.id not in taken and (not self.mix_tags or _has(row, self.mix_tags))]
        others.sort(key=lambda row: derive_seed(seed, "mixed in", row.id))
        taken |= {row.id for row in others[:num_others]}
        return [row for row in rows if row.id in taken]

    def _has_part(self, row: Record) -> bool:
        if self.part is None:
            return True
        number, parts = self.part
        # As in the split, the turns of one dialogue and all that begins with one question go together.
        anchor = split_keys(row, SplitConfig()).anchor
        return derive_seed(0, "part", anchor.hex()) % parts == number - 1


def _has(row: Record, tags: Sequence[str]) -> bool:
    return not set(row.tags).isdisjoint(tags)
