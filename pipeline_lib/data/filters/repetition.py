"""Refuse responses that repeat themselves: loops of a model, or text pasted many times."""

from __future__ import annotations

import re
from collections import Counter

from pydantic import Field

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools
from pipeline_lib.schema import Record
from pipeline_lib.validation import Frozen


class Repetition(Frozen):
    """Bound the share of a response that is repeated lines, one repeated phrase or one repeated character."""

    max_line_frac: float = Field(default=0.5, ge=0, le=1)
    """Largest share of lines that were there before, in responses of four lines or more."""
    max_phrase_frac: float = Field(default=0.5, ge=0, le=1)
    """Largest share of words covered by the most frequent run of four words, where it comes three times."""
    max_character_run: int = Field(default=200, ge=2)
    """Longest run of one character, white space aside."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:  # noqa: ARG002 - every rule takes both
        """Refuse a demonstration that repeats itself, or a comparison whose best response does."""
        best = min(record.ranks, default=1)
        for k, answer in enumerate(record.responses):
            is_taught = not record.ranks or record.ranks[k] == best
            reason = self._reason(answer.content) if is_taught else None
            if reason is not None:
                return Refusal("E_REPETITION", f"response {k + 1} {reason}")
        return None

    def _reason(self, text: str) -> str | None:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) >= 4 and (again := 1 - len(set(lines)) / len(lines)) > self.max_line_frac:
            return f"repeats {again:.0%} of its lines"
        words = text.split()
        phrases = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        _, count = phrases.most_common(1)[0] if phrases else (None, 0)
        if count >= 3 and (covered := 4 * count / len(words)) > self.max_phrase_frac:
            return f"has one phrase in {min(covered, 1.0):.0%} of its words"
        run = re.search(rf"(\S)\1{{{self.max_character_run},}}", text)
        return f"has one character {len(run.group())} times in a row" if run else None
