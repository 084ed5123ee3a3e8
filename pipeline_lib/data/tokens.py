"""Count tokens as the base model does, with its tokenizer file alone: no torch, no transformers."""

from __future__ import annotations

from typing import Any

from pipeline_lib.errors import ModelNotFoundError


class TokenizerFile:
    """A `tokenizer.json`, loaded for counting."""

    def __init__(self, content: bytes) -> None:
        """Parse the file.

        Raises:
            ModelNotFoundError: It is no tokenizer file.
        """
        # Imported here because only stages that count tokens need it.
        from tokenizers import Tokenizer  # noqa: PLC0415

        try:
            self._tokenizer: Any = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises bare Exceptions
            raise ModelNotFoundError(
                f"the base model's tokenizer.json cannot be read: {error}",
                next_step="take a base model with a fast tokenizer",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, special tokens not counted."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def special_tokens(self) -> tuple[str, ...]:
        """Return the special tokens as they are written, sorted."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(sorted({token.content for token in added if token.special and token.content.strip()}))
