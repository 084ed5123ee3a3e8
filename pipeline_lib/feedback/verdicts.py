"""From a judge's answers in both orders to one verdict a pair and one score a response.

Both orders say the same: that is the verdict. They disagree: a tie. One of them cannot be read: there is
no verdict on the pair, and nothing is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipeline_lib.feedback.questions import Form, Question

Standing = Mapping[int, float]
"""What one answer says of the responses that it was shown, by place; higher is better."""


@dataclass(frozen=True)
class PairVerdict:
    """What a judge says of two responses: 1 the first is better, 0 the second, 0.5 a tie."""

    first: int
    second: int
    in_order: float | None
    """Where the first one was shown first; None where that answer could not be read."""
    swapped: float | None
    """Where the second one was shown first."""

    @property
    def outcome(self) -> float | None:
        """The verdict; None where one of the two answers could not be read.

        Source: Zheng et al. 2023 (arXiv 2306.05685), section 3.4: a win counts in both orders alone.
        """
        if self.in_order is None or self.swapped is None:
            return None
        return self.in_order if self.in_order == self.swapped else 0.5


@dataclass(frozen=True)
class Judged:
    """What a judge says of the responses to one prompt."""

    pairs: tuple[PairVerdict, ...]
    scores: tuple[float | None, ...]
    """A number a response, 0 to 1; None where nothing could be read of it."""


def judged(form: Form, num_responses: int, read: Sequence[tuple[Question, Standing | None]]) -> Judged:
    """Put the answers about one prompt together.

    A pair or a ranking: a response's score is its adjusted win rate, the mean of its verdicts over the pairs
    that have one, (wins + ties / 2) / pairs. A rating: the mean of its marks in both orders.

    Args:
        form: How was asked.
        num_responses: K.
        read: Each question with what its answer says, None where it could not be read.
    """
    by_order = {question.order: standing for question, standing in read}
    pairs = tuple(_pair(form, num_responses, by_order, i, j) for i, j in combinations(range(num_responses), 2))
    if form == "rate":
        standings = [standing for _, standing in read]
        marks = [standing for standing in standings if standing is not None]
        whole = len(marks) == len(standings)
        means = tuple(
            math.fsum(mark[k] for mark in marks) / len(marks) if whole else None for k in range(num_responses)
        )
        return Judged(pairs, means)
    if num_responses == 1:
        return Judged(pairs, (0.5,))  # there was nothing to compare it with
    return Judged(pairs, tuple(_win_rate(pairs, k) for k in range(num_responses)))


def _pair(
    form: Form, num_responses: int, by_order: Mapping[tuple[int, ...], Standing | None], i: int, j: int
) -> PairVerdict:
    whole = tuple(range(num_responses))
    first, second = ((i, j), (j, i)) if form == "pair" else (whole, whole[::-1])
    return PairVerdict(i, j, _better(by_order[first], i, j), _better(by_order[second], i, j))


def _better(standing: Standing | None, i: int, j: int) -> float | None:
    if standing is None:
        return None
    return 0.5 if standing[i] == standing[j] else float(standing[i] > standing[j])


def _win_rate(pairs: Sequence[PairVerdict], place: int) -> float | None:
    points = [
        outcome if pair.first == place else 1 - outcome
        for pair in pairs
        if place in (pair.first, pair.second) and (outcome := pair.outcome) is not None
    ]
    return math.fsum(points) / len(points) if points else None
