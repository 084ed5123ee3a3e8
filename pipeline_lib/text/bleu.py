"""BLEU of words or token ids, against references or among samples. Pure Python.

Legend: M orders of n-grams, 1 to `max_n`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Tokens = Sequence[Hashable]
Ngram = tuple[Hashable, ...]
SMOOTHING = 0.1
"""Matches that an order without any is given, where BLEU is smoothed."""


@dataclass(frozen=True)
class Overlap:
    """What BLEU needs of some hypotheses; the overlaps of several add up."""

    matches: tuple[int, ...]
    """n-grams that a reference has as often, by order."""
    ngrams: tuple[int, ...]
    """n-grams of the hypothesis, by order."""
    length: int
    reference_length: int
    """Of the reference whose length is nearest; of two as near the shorter."""

    def __add__(self, other: Overlap) -> Overlap:
        """Return the overlap of both sets of hypotheses."""
        return Overlap(
            tuple(a + b for a, b in zip(self.matches, other.matches, strict=True)),
            tuple(a + b for a, b in zip(self.ngrams, other.ngrams, strict=True)),
            self.length + other.length,
            self.reference_length + other.reference_length,
        )

    def bleu(self, *, smoothing: float = 0.0) -> float:
        """Return brevity penalty times the geometric mean of the M precisions, 0 to 1.

        An order without a match counts as `smoothing` matches. Where not even one token matches the
        result is exactly 0, smoothed or not.
        """
        if self.matches[0] == 0:
            return 0.0
        counts = [match or smoothing for match in self.matches]
        if min(counts) == 0:
            return 0.0
        # A text too short for an order has no n-gram of it; one is counted, without a match.
        logs = [math.log(count / max(1, total)) for count, total in zip(counts, self.ngrams, strict=True)]
        penalty = min(0.0, 1.0 - self.reference_length / self.length)
        return math.exp(penalty + math.fsum(logs) / len(logs))


def overlap(hypothesis: Tokens, references: Sequence[Tokens], *, max_n: int = 4) -> Overlap:
    """Count the n-grams that a hypothesis shares with references.

    An n-gram counts at most as often as the reference has it that has it most often.

    Args:
        hypothesis: Words or token ids.
        references: One or more.
        max_n: Longest n-gram.

    Raises:
        ValueError: There is no reference.

    Source: Papineni et al. 2002, section 2.
    """
    if not references:
        raise ValueError("BLEU needs a reference")
    most: list[Counter[Ngram]] = []
    for n in range(1, max_n + 1):
        most.append(Counter())
        for reference in references:
            most[-1] |= _ngrams(reference, n)
    lengths = [len(reference) for reference in references]
    return _overlap(hypothesis, most, _nearest(lengths, len(hypothesis)))


def self_bleu(samples: Sequence[Tokens], *, max_n: int = 4) -> float:
    """Return the mean over samples of the smoothed BLEU of each against all others: 1 is one text again and again.

    Args:
        samples: Words or token ids; fewer than two have nothing in common, which is 0.
        max_n: Longest n-gram.

    Source: Zhu et al. 2018 (arXiv 1802.01886), section 2.1.2, smoothed by 0.1 as in their code.
    """
    if len(samples) < 2:
        return 0.0
    # A sample that has an n-gram most often is bounded by the second most; every other has no more than that.
    most = [_second_highest([_ngrams(sample, n) for sample in samples]) for n in range(1, max_n + 1)]
    lengths = [len(sample) for sample in samples]
    total = 0.0
    for place, sample in enumerate(samples):
        nearest = _nearest(lengths[:place] + lengths[place + 1 :], lengths[place])
        total += _overlap(sample, most, nearest).bleu(smoothing=SMOOTHING)
    return total / len(samples)


def _overlap(hypothesis: Tokens, most: Sequence[Counter[Ngram]], reference_length: int) -> Overlap:
    own = [_ngrams(hypothesis, n) for n in range(1, len(most) + 1)]
    return Overlap(
        tuple((mine & theirs).total() for mine, theirs in zip(own, most, strict=True)),
        tuple(mine.total() for mine in own),
        len(hypothesis),
        reference_length,
    )


def _ngrams(tokens: Tokens, n: int) -> Counter[Ngram]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _nearest(lengths: Sequence[int], length: int) -> int:
    return min(lengths, key=lambda other: (abs(other - length), other))


def _second_highest(counts: Sequence[Counter[Ngram]]) -> Counter[Ngram]:
    """Return for each n-gram the second highest of its counts; 0 where one sample alone has it."""
    highest, second = Counter[Ngram](), Counter[Ngram]()
    for own in counts:
        for gram, count in own.items():
            second[gram] = max(second[gram], min(count, highest[gram]))
            highest[gram] = max(highest[gram], count)
    return second
