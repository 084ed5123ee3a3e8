"""Layouts of human evaluations: numbered responses with a verdict, and systems that were ranked.

- `{"question": …, "prediction 1": …, …, "prediction 4": …, "preference": [1, 0, 2, …]}`
- `{"instruction": …, "response1": …, "response2": …, "annotator1": 1, "annotator2": 2, "annotator3": 1}`
- `{"prompt": …, "completion_a": …, "completion_b": …, "preference": "a-is-slightly-better"}`
- `{"question_text": …, "systems": {"bart": {"response": …, "overall": {"overall-ranking": 3}}}}`
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from typing import Any

from pipeline_lib.data.dialogue import Turns, kind_of
from pipeline_lib.data.fields import (
    checked_answer,
    dense_ranks,
    find,
    instruction_of,
    number_of,
    prompt_of,
    response_text,
    text_of,
)
from pipeline_lib.data.labels import Mapped, strength_in_words
from pipeline_lib.data.refusal import BadRowError
from pipeline_lib.schema import Author, Message, Strength

_NUMBERED = re.compile(r"(response|output|completion|answer|prediction|model)[ _-]?([1-9a-i])")
_ANNOTATOR = re.compile(r"annotator[ _-]?\d+")
_VERDICTS = ("preference", "label", "winner")
_TIES = ("0", "tie", "both", "neither", "equal")


def looks_compared(values: dict[str, Any]) -> bool:
    """Tell whether a row holds numbered responses and a verdict over them."""
    return len(_numbered(values)) >= 2 and bool(_verdict_names(values))


def looks_like_systems(values: dict[str, Any]) -> bool:
    """Tell whether a row holds the answers of named systems."""
    systems = values.get("systems")
    return isinstance(systems, dict) and len(systems) >= 2


def map_compared(values: dict[str, Any]) -> Mapped:
    """Map `response1`, `response2`, … and what was said of them.

    A list `preference` holds one label for each pair in the order 12, 13, …, 23, …: 0 a tie, 1 the
    first is better, 2 the second. One verdict is a number or a word; several annotators vote, and
    the share that agrees with the result is the row's weight.
    """
    numbered = _numbered(values)
    if len(numbered) < 2:
        raise BadRowError("E_MISSING_FIELD", f"no numbered responses among {', '.join(values)}"[:180])
    answers = tuple(response_text(values[name], name) for name in numbered)
    ranks, strength, weight = _verdict(values, len(answers))
    return Mapped(_asked(values), answers, ranks, authors=_authors(values, numbered), strength=strength, weight=weight)


def map_systems(values: dict[str, Any]) -> Mapped:
    """Map `systems`: the answer of each, its overall ranking (1 the best) and rating, and reviews.

    The weight is the share of the reviewers' comparisons that agree with the ranking.
    """
    systems = values["systems"] if looks_like_systems(values) else None
    if systems is None:
        raise BadRowError("E_MISSING_FIELD", "no field 'systems' with two or more systems")
    answers, rankings, ratings, authors = [], [], [], []
    for name, system in systems.items():
        overall = system.get("overall") if isinstance(system, dict) else None
        if not isinstance(overall, dict) or overall.get("overall-ranking") is None:
            raise BadRowError("E_MISSING_FIELD", f"the system {name!r} has no overall ranking")
        answers.append(response_text(system, name))
        rankings.append(number_of(overall["overall-ranking"], "overall-ranking"))
        rating = overall.get("overall-rating")
        ratings.append(None if rating is None else number_of(rating, "overall-rating"))
        authors.append(Author(kind="human") if name == "human" else Author(kind="model", name=name))
    ranks = dense_ranks(rankings)
    weight = _agreement(list(systems.values()), ranks)
    return Mapped(_asked(values), tuple(answers), ranks, scores=tuple(ratings), authors=tuple(authors), weight=weight)


def ranks_of_pairs(labels: list[int], num_responses: int) -> tuple[int, ...]:
    """Turn a label for every pair into ranks: 1 the best, equal where all labels say so.

    Args:
        labels: 0 a tie, 1 the first is better, 2 the second; pairs in the order 12, 13, …, 23, ….
        num_responses: K; there are K (K - 1) / 2 labels.

    Raises:
        BadRowError: `E_RANKS` for another number of labels, `E_CONTRADICTION` where no order of the
            responses agrees with all of them (a better than b, b than c, c than a).
    """
    pairs = list(combinations(range(num_responses), 2))
    if len(labels) != len(pairs):
        raise BadRowError("E_RANKS", f"{len(labels)} labels for the {len(pairs)} pairs of {num_responses} responses")
    # Wins less losses orders the responses, if anything does.
    net = [0.0] * num_responses
    for (first, second), label in zip(pairs, labels, strict=True):
        sign = {0: 0, 1: 1, 2: -1}[label]
        net[first] += sign
        net[second] -= sign
    for (first, second), label in zip(pairs, labels, strict=True):
        found = 0 if net[first] == net[second] else 1 if net[first] > net[second] else 2
        if found != label:
            raise BadRowError("E_CONTRADICTION", f"no order agrees with all labels {labels}")
    return dense_ranks([-value for value in net])


def _numbered(values: dict[str, Any]) -> list[str]:
    """Return the names of the responses in their order; the stem that most fields have counts."""
    by_stem: dict[str, dict[str, str]] = {}
    for name in values:
        match = _NUMBERED.fullmatch(name)
        if match and match[1] != "model":
            by_stem.setdefault(match[1], {})[match[2]] = name
    best = max(by_stem.values(), key=len, default={})
    places = sorted(best)
    starts_at = "1" if places and places[0].isdigit() else "a"
    is_whole = places == [chr(ord(starts_at) + offset) for offset in range(len(places))]
    return [best[place] for place in places] if is_whole else []


def _authors(values: dict[str, Any], numbered: list[str]) -> tuple[Author, ...]:
    """Return the models that `model_a`, `model_b`, … name, where they do so for every response."""
    models = {match[2]: values[name] for name in values if (match := _NUMBERED.fullmatch(name)) and match[1] == "model"}
    found = [models.get(name[-1]) for name in numbered]
    names = [model for model in found if isinstance(model, str)]
    return tuple(Author(kind="model", name=name) for name in names) if len(names) == len(numbered) else ()


def _asked(values: dict[str, Any]) -> Turns:
    if "instruction" in values:
        return instruction_of(values)
    if find(values, "prompt") is not None:
        return prompt_of(values)
    name = "question_text" if "question_text" in values else "input"
    return (Message(role="user", content=checked_answer(text_of(values, name, empty="E_EMPTY_PROMPT"), name)),)


def _verdict_names(values: dict[str, Any]) -> list[str]:
    votes = [name for name in values if _ANNOTATOR.fullmatch(name)]
    return votes or [name for name in _VERDICTS if values.get(name) is not None][:1]


def _verdict(values: dict[str, Any], num_responses: int) -> tuple[tuple[int, ...], Strength | None, float]:
    """Return ranks, strength and weight."""
    names = _verdict_names(values)
    if not names:
        raise BadRowError("E_MISSING_FIELD", f"no verdict among {', '.join(values)}"[:180])
    given = [values[name] for name in names]
    if isinstance(given[0], list):
        return ranks_of_pairs([_choice(label, names[0]) for label in given[0]], num_responses), None, 1.0
    if num_responses != 2:
        raise BadRowError("E_RANKS", f"one verdict cannot order {num_responses} responses")
    votes = Counter(_choice(vote, names[0]) for vote in given)
    choice, agreeing = votes.most_common(1)[0]
    if list(votes.values()).count(agreeing) > 1:  # nobody has a majority: neither response is better
        choice, agreeing = 0, votes[0] or agreeing
    is_graded = choice and isinstance(given[0], str) and "better" in given[0]
    strength = strength_in_words(given[0]) if is_graded else None
    return ((1, 1), (1, 2), (2, 1))[choice], strength, agreeing / len(given)


def _choice(verdict: Any, name: str) -> int:
    """Return 0 for a tie, 1 for the first and 2 for the second; a number between 1 and 2 leans."""
    if isinstance(verdict, str):
        words = verdict.casefold().strip()
        if words.startswith(_TIES):
            return 0
        match = re.fullmatch(r"(?:[a-z]*[ _-]?)?([12ab])(?:[ _-]is[ _-].*)?", words)
        if match is None:
            raise BadRowError("E_VERDICT", f"{name} = {verdict[:40]!r} names no response")
        return 1 if match[1] in "1a" else 2
    number = number_of(verdict, name)
    if number != 0 and not 1 <= number <= 2:
        raise BadRowError("E_VERDICT", f"{name} = {number:g} is none of 0 (tie), 1 and 2")
    return 0 if number in (0, 1.5) else 1 if number < 1.5 else 2


def _agreement(systems: list[Any], ranks: tuple[int, ...]) -> float:
    """Return the share of the reviewers' comparisons that agree with the ranking; ties count half."""
    by_worker: dict[Any, dict[int, float]] = {}
    for place, system in enumerate(systems):
        reviews = system.get("reviews")
        if not isinstance(reviews, list):
            return 1.0
        for review in reviews:
            if not isinstance(review, dict) or review.get("overall-rank") is None:
                raise BadRowError("E_TYPE", f"a review is {kind_of(review)} without overall-rank")
            by_worker.setdefault(review.get("worker_id"), {})[place] = number_of(review["overall-rank"], "overall-rank")
    agreed, total = 0.0, 0
    for places in by_worker.values():
        for first, second in combinations(sorted(places), 2):
            if ranks[first] != ranks[second]:
                total += 1
                difference = (places[second] - places[first]) * (ranks[second] - ranks[first])
                agreed += 0.5 if difference == 0 else float(difference > 0)
    if total and not agreed:
        raise BadRowError("E_CONTRADICTION", "no reviewer agrees with the ranking")
    return agreed / total if total else 1.0
