"""Cut a text to whole sentences: from after its first mark to its last that fits (N-details 2 and 12)."""

from __future__ import annotations

from collections.abc import Callable


def cropped(
    text: str, *, start_text: str | None, end_text: str | None, fits: Callable[[str], bool] = lambda _: True
) -> str | None:
    """Return the text after its first start mark and up to, and with, its last end mark; None without both.

    Args:
        text: Any text.
        start_text: E.g. "."; None keeps the beginning.
        end_text: E.g. "."; looked for after the start; None keeps the end, whether it fits or not.
        fits: True for a text that is short enough. The end mark is the last one up to which it is, as
            OpenAI's code first cuts a query to its length and then to its last mark.

    Source: `start_text` and `end_text` of openai/lm-human-preferences, `lm_human_preferences/language/datasets`.
    """
    if start_text is not None:
        _, found, text = text.partition(start_text)
        if not found:
            return None
    while end_text is not None:
        before, found, _ = text.rpartition(end_text)
        if not found:
            return None
        text = before + found
        if fits(text.strip()):
            break
        text = before
    return text.strip() or None
