"""Metrics of texts: ROUGE-L and distinct-n. Pure Python, no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Split a text as ROUGE does: lower case, runs of ASCII letters and digits, no stemming."""
    return _WORD.findall(text.lower())


def rouge_l(response: str, reference: str) -> float:
    """Return ROUGE-L F1, 0 to 1: the longest common subsequence of words against both lengths.

    Source: Lin 2004, as in the package rouge-score without stemming.
    """
    mine, theirs = words(response), words(reference)
    if not mine or not theirs:
        return 0.0
    common = _longest_common_subsequence(mine, theirs)
    if common == 0:
        return 0.0
    precision, recall = common / len(mine), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def distinct_n(texts: Iterable[str], n: int) -> float | None:
    """Return different word n-grams over all word n-grams of some texts; None where there is none.

    No n-gram goes from one text into the next.

    Source: Li et al. 2016 (arXiv 1510.03055).
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        tokens = words(text)
        for start in range(len(tokens) - n + 1):
            seen.add(tuple(tokens[start : start + n]))
            total += 1
    return len(seen) / total if total else None
