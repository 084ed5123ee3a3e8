"""One tokenizer and one chat template, named by their sha256, from SFT to the served model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.hashing import sha256_bytes
from pipeline_lib.schema import Message

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message['role']] + ': ' }}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""Given to a model whose tokenizer has no chat template of its own."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template, and the few questions that the code asks of it."""

    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, directory: Path) -> ChatTokenizer:
        """Load the tokenizer of a model directory; never reaches out to a hub, never runs its code."""
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return cls.of(tokenizer)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
        """Take a tokenizer, give it the plain template where it has none, and check its EOS.

        Raises:
            ConfigError: The tokenizer names no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the base model's tokenizer has no end-of-sequence token, so a response could never end",
                next_step="set eos_token in the model's tokenizer_config.json",
            )
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        return cls(tokenizer)

    def with_template(self, template: str) -> ChatTokenizer:
        """Return the same tokenizer with another chat template; this one stays as it is."""
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template
        return ChatTokenizer(tokenizer)

    def write_template(self, directory: Path) -> None:
        """Give the tokenizer of a model folder this chat template; its vocabulary stays its own."""
        kept = ChatTokenizer.load(directory).tokenizer
        kept.chat_template = self.tokenizer.chat_template
        kept.save_pretrained(directory)

    @property
    def begins_with_bos(self) -> bool:
        """True where the tokenizer itself puts its beginning-of-sequence token in front of a text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("")["input_ids"])[:1] == [bos]

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an assistant turn."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Id used where a batch has nothing; always masked, so it may equal the EOS id."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @cached_property
    def template_sha256(self) -> str:
        """Sha256 of the chat template's text."""
        return sha256_bytes(str(self.tokenizer.chat_template).encode())

    @cached_property
    def control_strings(self) -> tuple[str, ...]:
        """Strings that the tokenizer turns into control tokens, which content may not hold."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(sorted({str(token.content) for token in added if token.special and token.content}))

    def render(self, messages: tuple[Message, ...], *, add_generation_prompt: bool) -> str:
        """Render a dialogue as the text the model sees."""
        turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in messages]
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def ids(self, text: str) -> list[int]:
        """Tokenise text that the template has already given its control tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def refuse_control_strings(self, content: str, *, where: str) -> None:
        """Refuse content that would be tokenised as control tokens.

        Raises:
            DataError: Naming the string and the row.
        """
        for control in self.control_strings:
            if control in content:
                raise DataError(
                    f"{where}: the text holds the control string {control!r}",
                    next_step="keep the filter rule `control_tokens`, or remove the string from the text",
                )

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids without control tokens, outer white space stripped."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
