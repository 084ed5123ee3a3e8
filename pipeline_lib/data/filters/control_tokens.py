"""Refuse texts that contain the control tokens of chat templates.

A tokenizer turns such a string into the real control token, and a row could then end a turn, speak
as the system, or teach the model to do so.
"""

from __future__ import annotations

import re

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import Tools, texts_of
from pipeline_lib.schema import Record
from pipeline_lib.text.normalize import strip_tags, strip_zero_width
from pipeline_lib.validation import Frozen

_KNOWN = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]>"  # ChatML, Llama 3, Phi, DeepSeek
    r"|</?s>|</?bos>|</?eos>|<pad>|<unk>"
    r"|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|SYSTEM_PROMPT)\]"
    r"|<(?:start|end)_of_turn>|<reserved_\d+>",
    re.IGNORECASE,
)


class ControlTokens(Frozen):
    """Refuse the control tokens of the common templates and those of the base model's tokenizer."""

    allow: tuple[str, ...] = ()
    """Strings that may stay, e.g. `<s>` in texts about HTML with a model that has no such token."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:
        """Refuse a record with a control token in any text, also one broken by invisible characters."""
        own = [token for token in tools.special_tokens if token not in self.allow]
        for where, text in texts_of(record):
            seen = text if text.isascii() else strip_zero_width(strip_tags(text))
            token = next((token for token in own if token in seen or token in text), None)
            known = (match.group(0) for match in _KNOWN.finditer(seen))
            token = token or next((found for found in known if found not in self.allow), None)
            if token is not None:
                return Refusal("E_CONTROL_TOKEN", f"{where} contains the control token {token!r}")
        return None
