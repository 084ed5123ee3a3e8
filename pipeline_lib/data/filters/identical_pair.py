"""Refuse comparisons of a text with itself."""

from __future__ import annotations

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools
from pipeline_lib.schema import Record
from pipeline_lib.text.normalize import comparison_key
from pipeline_lib.validation import Frozen


class IdenticalPair(Frozen):
    """Refuse two responses that look the same: case, white space and invisible characters aside."""

    allow_equal_ranks: bool = False
    """Keep equal texts that were given equal ranks."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:  # noqa: ARG002 - every rule takes both
        """Refuse a comparison with two equal responses."""
        first_by_text: dict[str, int] = {}
        for k, answer in enumerate(record.responses if len(record.responses) >= 2 else ()):
            first = first_by_text.setdefault(comparison_key(answer.content), k)
            if first != k and not (self.allow_equal_ranks and record.ranks[first] == record.ranks[k]):
                return Refusal("E_IDENTICAL_PAIR", f"responses {first + 1} and {k + 1} are the same text")
        return None
