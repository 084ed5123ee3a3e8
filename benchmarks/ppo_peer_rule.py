"""The rule that both sides' responses are scored by. Imports nothing: both environments use it."""

from __future__ import annotations


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case, without the marks at their ends."""
    return [word for word in (piece.strip(".,;:!?()\"'").lower() for piece in text.split()) if word]


def share_of(text: str, wanted: tuple[str, ...]) -> float:
    """Return the share of a text's words that are wanted ones; 0 where it has no word."""
    words = words_of(text)
    return sum(word in wanted for word in words) / len(words) if words else 0.0


def variety_of(text: str, wanted: tuple[str, ...]) -> float:
    """Return the share of the wanted words that a text has."""
    words = words_of(text)
    return sum(word in words for word in wanted) / len(wanted)


def score(text: str, wanted: tuple[str, ...]) -> float:
    """Return the mean of both: 1 where a text has every wanted word, and no other."""
    return (share_of(text, wanted) + variety_of(text, wanted)) / 2
