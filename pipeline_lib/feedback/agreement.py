"""How far two judgements of the same pairs agree, and what a judge favours besides quality."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline_lib.feedback.verdicts import PairVerdict


@dataclass(frozen=True)
class Agreement:
    """Two judgements of the same pairs, each 1 (the first is better), 0.5 (a tie) or 0 (the second)."""

    num_pairs: int
    agree_frac: float | None
    """Share of pairs on which both say the same; None without a pair."""
    kappa: float | None
    """Cohen's kappa over the three verdicts; None where chance alone would agree on everything."""
    decided_pairs: int
    """Pairs that neither calls a tie."""
    decided_frac: float | None
    """Share of those on which both say the same."""

    def figures(self) -> dict[str, float | int | None]:
        """Return the figures by name."""
        return {
            "pairs": self.num_pairs, "agree_frac": self.agree_frac, "kappa": self.kappa,
            "decided_pairs": self.decided_pairs, "decided_agree_frac": self.decided_frac,
        }  # fmt: skip


def agreement(verdicts: Iterable[tuple[float, float]]) -> Agreement:
    """Compare two judgements, given pair by pair.

    Source: Cohen 1960; the share of agreement as in Zheng et al. 2023 (arXiv 2306.05685), section 4.1.
    """
    both = list(verdicts)
    decided = [(one, other) for one, other in both if one != 0.5 and other != 0.5]
    return Agreement(
        len(both), _same_frac(both), cohens_kappa(both), decided_pairs=len(decided), decided_frac=_same_frac(decided)
    )


def cohens_kappa(verdicts: Sequence[tuple[float, float]]) -> float | None:
    """Return (p_o - p_e) / (1 - p_e): agreement beyond what equal shares would give by chance.

    Returns:
        A number of -1 to 1; None without a pair, and where both always say one and the same.
    """
    total = len(verdicts)
    if total == 0:
        return None
    ones, others = Counter(one for one, _ in verdicts), Counter(other for _, other in verdicts)
    by_chance = math.fsum(ones[verdict] * others[verdict] for verdict in ones) / total**2
    if by_chance == 1:
        return None
    return (sum(one == other for one, other in verdicts) / total - by_chance) / (1 - by_chance)


def preferred(first: float, second: float) -> float:
    """Return the verdict that two scores give: 1, 0.5 or 0."""
    return 0.5 if first == second else float(first > second)


@dataclass(frozen=True)
class Leanings:
    """What a judge favours."""

    between_orders: Agreement
    first_shown_frac: float | None
    """Share of verdicts, ties aside, for the response that was shown first; 0.5 where position means nothing."""
    longer_frac: float | None
    """Share of decided pairs of unequal length in which the longer response is the better one."""


def leanings(pairs: Iterable[tuple[PairVerdict, int, int]]) -> Leanings:
    """Measure a judge by its own verdicts.

    Args:
        pairs: Verdicts, each with the lengths of the first and the second response in characters.
    """
    read = [(pair, one, other) for pair, one, other in pairs if pair.in_order is not None and pair.swapped is not None]
    for_first = [verdict for pair, _, _ in read for verdict in (pair.in_order or 0.0, 1 - (pair.swapped or 0.0))]
    decided = [verdict for verdict in for_first if verdict != 0.5]
    longer = [
        float((outcome == 1) == (one > other))
        for pair, one, other in read
        if (outcome := pair.outcome) not in (None, 0.5) and one != other
    ]
    return Leanings(
        agreement((pair.in_order or 0.0, pair.swapped or 0.0) for pair, _, _ in read), _mean(decided), _mean(longer)
    )


def _same_frac(verdicts: Sequence[tuple[float, float]]) -> float | None:
    return _mean([float(one == other) for one, other in verdicts])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
