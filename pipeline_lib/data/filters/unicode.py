"""Bring every text into one Unicode form; refuse what no form can mend."""

from __future__ import annotations

import unicodedata

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools, texts_of
from pipeline_lib.schema import Message, Record
from pipeline_lib.text.normalize import (
    has_lone_surrogate,
    has_zalgo,
    normalise,
    strip_bidi,
    strip_controls,
    strip_tags,
    strip_zero_width,
    unify_line_ends,
)
from pipeline_lib.validation import Frozen


class Unicode(Frozen):
    r"""Write texts in NFC with `\n` line ends and without invisible characters."""

    nfc: bool = True
    """Compose letters and their marks."""
    controls: bool = True
    """Remove control characters and terminal escape sequences."""
    bidi: bool = True
    """Remove the characters that change the direction in which text is shown."""
    zero_width: bool = True
    """Remove characters of no width; emoji and scripts that need joiners keep them."""
    tags: bool = True
    """Remove tag characters, which can hide text; flags keep them."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:  # noqa: ARG002 - every rule takes both
        """Refuse half characters and marks stacked beyond any script's need."""
        for where, text in texts_of(record):
            if has_lone_surrogate(text):
                return Refusal("E_SURROGATE", f"{where} holds half a character (lone surrogate)")
            if has_zalgo(text):
                return Refusal("E_COMBINING", f"{where} stacks marks on one letter beyond any script's need")
        return None

    def transform(self, record: Record) -> Record:
        """Return the record in its normal form; its id follows its content, its group stays."""
        messages = tuple(Message(role=turn.role, content=self._form(turn.content)) for turn in record.messages)
        responses = tuple(
            answer.model_copy(update={"content": self._form(answer.content)}) for answer in record.responses
        )
        if messages == record.messages and responses == record.responses:
            return record
        return Record.create(
            messages, responses, record.ranks, origin=record.origin, group=record.group, split=record.split,
            strength=record.strength, weight=record.weight, tags=record.tags, desirable=record.desirable,
        )  # fmt: skip

    def _form(self, text: str) -> str:
        if self == _EVERYTHING:
            return normalise(text)
        text = unify_line_ends(text)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.controls:
            text = strip_controls(text)
        if self.bidi:
            text = strip_bidi(text)
        if self.tags:
            text = strip_tags(text)
        if self.zero_width:
            text = strip_zero_width(text)
        return unicodedata.normalize("NFC", text) if self.nfc else text


_EVERYTHING = Unicode()
