"""Refuse records with nothing to read in a turn or a response."""

from __future__ import annotations

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools
from pipeline_lib.schema import Record
from pipeline_lib.text.normalize import comparison_key
from pipeline_lib.validation import Frozen


class Empty(Frozen):
    """Refuse empty texts; white space and invisible characters are nothing."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:  # noqa: ARG002 - every rule takes both
        """Refuse a record with an empty turn or response."""
        for index, turn in enumerate(record.messages, start=1):
            if turn.role != "system" and not comparison_key(turn.content):
                return Refusal("E_EMPTY_PROMPT", f"turn {index} is empty")
        for k, answer in enumerate(record.responses, start=1):
            if not comparison_key(answer.content):
                return Refusal("E_EMPTY_RESPONSE", f"response {k} is empty")
        return None
