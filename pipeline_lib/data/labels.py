"""What people said of a row besides the order of its responses: scores, strength, weight, tags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline_lib.data.dialogue import Turns, kind_of
from pipeline_lib.data.fields import find, number_of
from pipeline_lib.data.refusal import BadRowError
from pipeline_lib.schema import Author, Strength

_STRENGTH_OF_WORD: tuple[tuple[str, Strength], ...] = (
    ("significant", "significantly"), ("much", "significantly"), ("slight", "slightly"),
    ("negligib", "unsure"), ("unsure", "unsure"), ("better", "better"), ("worse", "better"),
)  # fmt: skip
"""A part of the word, and what it means; the first that is found counts."""
_STRENGTH_OF_NUMBER: tuple[Strength, ...] = ("unsure", "slightly", "better", "significantly")


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a layout finds in a row."""

    prompt: Turns
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    """One a response, empty where the row has none."""
    authors: tuple[Author, ...] = ()
    """One a response, empty where the row does not say."""
    strength: Strength | None = None
    """As the layout's own verdict has it; a field `strength` comes first."""
    weight: float = 1.0
    """As the layout's own votes have it; a field `weight` comes first."""
    desirable: bool | None = None
    """The label of one response, where the layout has it."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What is read from any row, whatever its layout."""

    strength: Strength | None
    weight: float
    tags: tuple[str, ...]


def labels_of(values: dict[str, Any], mapped: Mapped) -> Labels:
    """Read `strength`, `weight` and `tags` of a row.

    Args:
        values: The row's fields under their canonical names.
        mapped: What its layout found; its own strength and weight count where no field has one.

    Raises:
        BadRowError: `E_TYPE`, `E_STRENGTH` or `E_WEIGHT`.
    """
    strength = strength_of(values) if len(mapped.responses) >= 2 else None
    weight = _weight_of(values)
    return Labels(strength or mapped.strength, mapped.weight if weight is None else weight, _tags_of(values))


def strength_of(values: dict[str, Any]) -> Strength | None:
    """Read how much better the better response is: LLaMA-2's words, or -3 … 3 as HelpSteer has it.

    A `margin` or `rating` that is a number is a difference or a score, not a strength.
    """
    name = find(values, "strength")
    value = values[name] if name is not None else None
    if value is None or (name in ("margin", "rating") and not isinstance(value, str)):
        return None
    if isinstance(value, str):
        return strength_in_words(value)
    number = abs(number_of(value, str(name)))
    if number not in (0, 1, 2, 3):
        raise BadRowError("E_STRENGTH", f"{name} = {value} is not a whole number in -3 … 3")
    return _STRENGTH_OF_NUMBER[int(number)]


def strength_in_words(text: str) -> Strength:
    """Return the strength that a judgement in words says, e.g. `a-is-slightly-better`.

    Raises:
        BadRowError: `E_STRENGTH`.
    """
    words = text.casefold()
    for part, strength in _STRENGTH_OF_WORD:
        if part in words:
            return strength
    raise BadRowError("E_STRENGTH", f"the strength {text[:40]!r} is none of significantly, better, slightly, unsure")


def single_score(values: dict[str, Any]) -> tuple[float | None, ...]:
    """Return the score of a row's one response, empty where it has none."""
    name = find(values, "score")
    return () if name is None or values[name] is None else (number_of(values[name], name),)


def scores_of_objects(responses: list[Any]) -> list[float] | None:
    """Return the scores that responses hold themselves, `None` where not all of them do.

    `pm_score` and `score` are taken as they are; `upvotes`, with `accepted` or `selected`, as
    `stack_exchange_score` has it.
    """
    scores = [_own_score(response) for response in responses if isinstance(response, dict)]
    found = [score for score in scores if score is not None]
    return found if found and len(found) == len(responses) else None


def _own_score(response: dict[str, Any]) -> float | None:
    for name in ("pm_score", "score"):
        if response.get(name) is not None:
            return number_of(response[name], name)
    if response.get("upvotes") is None:
        return None
    is_accepted = bool(response.get("accepted", response.get("selected", False)))
    return float(stack_exchange_score(number_of(response["upvotes"], "upvotes"), is_accepted=is_accepted))


def stack_exchange_score(upvotes: float, *, is_accepted: bool) -> int:
    """Return round(log2(1 + upvotes)), and 1 more where the answer was accepted; -1 below 0 upvotes.

    Args:
        upvotes: Votes for the answer less votes against it.
        is_accepted: True where the person who asked took the answer.

    Source: Askell et al. 2021 (arXiv 2112.00861), C.1, as StackLLaMA uses it.
    """
    if upvotes < 0:
        return -1
    return round(math.log2(1 + upvotes)) + int(is_accepted)


def _weight_of(values: dict[str, Any]) -> float | None:
    name = find(values, "weight")
    if name is None or values[name] is None:
        return None
    weight = number_of(values[name], name)
    if weight <= 0:
        raise BadRowError("E_WEIGHT", f"{name} = {weight:g}: a row that does not count should not be there")
    return weight


def _tags_of(values: dict[str, Any]) -> tuple[str, ...]:
    name = find(values, "tags")
    value = values[name] if name is not None else None
    given = value if isinstance(value, list) else [] if value in (None, "") else [value]
    for tag in given:
        if isinstance(tag, bool) or not isinstance(tag, str | int):
            raise BadRowError("E_TYPE", f"{name} holds {kind_of(tag)}, not text")
    return tuple(dict.fromkeys(str(tag) for tag in given))
