"""Cut a text to whole sentences: from after its first mark to its last (N-details 12)."""

from __future__ import annotations


def cropped(text: str, *, start_text: str | None, end_text: str | None) -> str | None:
    """Return the text after its first start mark and up to, and with, its last end mark; None without both.

    Args:
        text: Any text.
        start_text: E.g. "."; None keeps the beginning.
        end_text: E.g. "."; looked for after the start; None keeps the end.

    Source: `start_text` and `end_text` of openai/lm-human-preferences, `lm_human_preferences/language/datasets`.
    """
    if start_text is not None:
        _, found, text = text.partition(start_text)
        if not found:
            return None
    if end_text is not None:
        kept, found, _ = text.rpartition(end_text)
        if not found:
            return None
        text = kept + found
    return text.strip() or None
