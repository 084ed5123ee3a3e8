"""Refuse dialogues whose turns are out of order."""

from __future__ import annotations

from pydantic import Field

from pipeline_lib.data.dialogue import role_problem
from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools
from pipeline_lib.schema import Record
from pipeline_lib.validation import Frozen


class Roles(Frozen):
    """Ask for one system turn at most, at the start, then user and assistant in turn."""

    max_turns: int | None = Field(default=None, ge=1)
    """Longest prompt, in turns."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:  # noqa: ARG002 - every rule takes both
        """Refuse a prompt whose turns are out of order or too many."""
        if self.max_turns is not None and len(record.messages) > self.max_turns:
            return Refusal("E_TOO_MANY_TURNS", f"{len(record.messages)} turns, at most {self.max_turns}")
        return role_problem(record.messages)
