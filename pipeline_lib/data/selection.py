"""Which rows a training stage takes: by tag, and a share of others mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

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
        """Return the rows with one of the tags and the share of others, in their order.

        Of N own rows and the share f, round(N f / (1 - f)) others are chosen by the seed.
        """
        own = self.own(rows)
        num_others = round(len(own) * self.mix_frac / (1 - self.mix_frac))
        taken = {row.id for row in own}
        others = [row for row in rows if row.id not in taken and (not self.mix_tags or _has(row, self.mix_tags))]
        others.sort(key=lambda row: derive_seed(seed, "mixed in", row.id))
        taken |= {row.id for row in others[:num_others]}
        return [row for row in rows if row.id in taken]


def _has(row: Record, tags: Sequence[str]) -> bool:
    return not set(row.tags).isdisjoint(tags)
