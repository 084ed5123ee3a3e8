"""Refuse comparisons whose responses differ too much in length to say anything but that."""

from __future__ import annotations

from pydantic import Field

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools
from pipeline_lib.schema import Record
from pipeline_lib.validation import Frozen


class LengthRatio(Frozen):
    """Bound how many times longer the longest response is than the shortest."""

    at_most: float = Field(default=50.0, gt=1)
    """Largest ratio of characters."""
    grace_characters: int = Field(default=20, ge=1)
    """Shorter responses count as this long: a plain "No." may be the right answer."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:  # noqa: ARG002 - every rule takes both
        """Refuse a comparison beyond the ratio."""
        if len(record.responses) < 2:
            return None
        lengths = [max(len(answer.content), self.grace_characters) for answer in record.responses]
        ratio = max(lengths) / min(lengths)
        if ratio > self.at_most:
            return Refusal("E_LENGTH_RATIO", f"one response is {ratio:.1f} times as long, at most {self.at_most:g}")
        return None
