"""What a filter rule is, and what it may use besides the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.schema import Record


class TokenCounter(Protocol):
    """Counts tokens as the base model's tokenizer does."""

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, special tokens not counted."""


@dataclass(frozen=True)
class Tools:
    """What a rule may use besides the record; the same for every record of a run."""

    tokens: TokenCounter | None = None
    """The base model's tokenizer, where one was given."""
    special_tokens: tuple[str, ...] = ()
    """The tokenizer's special tokens as they are written."""


@runtime_checkable
class Rule(Protocol):
    """A filter rule: one frozen class, its fields its parameters. Looks at one record at a time."""

    def reject(self, record: Record, tools: Tools) -> Refusal | None:
        """Return why the record is not taken, or `None`."""


@runtime_checkable
class Transform(Protocol):
    """A rule that also rewrites the records it takes. Applying it twice changes nothing more."""

    def transform(self, record: Record) -> Record:
        """Return the record in its new form."""


@runtime_checkable
class NeedsTokens(Protocol):
    """A rule that may need the base model's tokenizer."""

    @property
    def needs_tokens(self) -> bool:
        """True where its parameters need tokens counted."""


def texts_of(record: Record) -> list[tuple[str, str]]:
    """Return `(where, text)` of every text of a record, e.g. `("response 2", ...)`."""
    prompt = [(f"turn {index}", turn.content) for index, turn in enumerate(record.messages, start=1)]
    return prompt + [(f"response {k}", answer.content) for k, answer in enumerate(record.responses, start=1)]
