"""Refuse prompts and responses that are too short or too long, in characters, words or tokens."""

from __future__ import annotations

from pydantic import Field

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.data.rule import TokenCounter, Tools
from pipeline_lib.schema import Record
from pipeline_lib.validation import Frozen


class Length(Frozen):
    """Bound the lengths of a record. The prompt counts with all its turns, each response alone."""

    max_characters: int | None = Field(default=200_000, ge=1)
    """Longest prompt or response, in characters; checked first, since it costs nothing."""
    min_prompt_words: int = Field(default=1, ge=0)
    """Shortest prompt."""
    min_response_words: int = Field(default=1, ge=0)
    """Shortest response."""
    max_response_words: int | None = Field(default=None, ge=1)
    """Longest response."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens of the base model, the chat template's own tokens not counted."""
    max_response_tokens: int | None = Field(default=None, ge=1)
    """Longest response, in tokens of the base model."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt and response together, in tokens of the base model."""

    @property
    def needs_tokens(self) -> bool:
        """True where a bound is in tokens."""
        return not (self.max_prompt_tokens is None and self.max_response_tokens is None and self.max_tokens is None)

    def reject(self, record: Record, tools: Tools) -> Refusal | None:
        """Refuse a record one of whose texts is out of bounds."""
        prompt = "\n".join(turn.content for turn in record.messages)
        answers = [answer.content for answer in record.responses]
        refusal = self._by_characters(prompt, answers) or self._by_words(prompt, answers)
        if refusal is None and self.needs_tokens:
            assert tools.tokens is not None, "the stage gives a token counter to rules that need one"
            refusal = self._by_tokens(prompt, answers, tools.tokens)
        return refusal

    def _by_characters(self, prompt: str, answers: list[str]) -> Refusal | None:
        longest = max(len(text) for text in [prompt, *answers])
        if self.max_characters is not None and longest > self.max_characters:
            return Refusal("E_TOO_LONG", f"a text of {longest} characters, at most {self.max_characters}")
        return None

    def _by_words(self, prompt: str, answers: list[str]) -> Refusal | None:
        words = len(prompt.split())
        if words < self.min_prompt_words:
            return Refusal("E_TOO_SHORT", f"a prompt of {words} words, at least {self.min_prompt_words}")
        for answer in answers:
            words = len(answer.split())
            if words < self.min_response_words:
                return Refusal("E_TOO_SHORT", f"a response of {words} words, at least {self.min_response_words}")
            if self.max_response_words is not None and words > self.max_response_words:
                return Refusal("E_TOO_LONG", f"a response of {words} words, at most {self.max_response_words}")
        return None

    def _by_tokens(self, prompt: str, answers: list[str], counter: TokenCounter) -> Refusal | None:
        prompt_tokens = counter.count(prompt)
        if self.max_prompt_tokens is not None and prompt_tokens > self.max_prompt_tokens:
            return Refusal("E_TOO_LONG", f"a prompt of {prompt_tokens} tokens, at most {self.max_prompt_tokens}")
        for answer in answers:
            tokens = counter.count(answer)
            if self.max_response_tokens is not None and tokens > self.max_response_tokens:
                return Refusal("E_TOO_LONG", f"a response of {tokens} tokens, at most {self.max_response_tokens}")
            if self.max_tokens is not None and prompt_tokens + tokens > self.max_tokens:
                return Refusal("E_TOO_LONG", f"{prompt_tokens + tokens} tokens together, at most {self.max_tokens}")
        return None
