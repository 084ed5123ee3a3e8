"""Single fields of a row: under which name they stand, of which type they must be.

Every function raises `BadRowError` with its own code for a field that is missing, of the wrong
type or empty.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline_lib.data.dialogue import Turns, kind_of, looks_like_hh, parse_hh, parse_turns, role_problem
from pipeline_lib.data.refusal import BadRowError
from pipeline_lib.schema import Message

_ALIASES = {
    "prompt": ("prompt", "question", "query"),
    "response": ("response", "completion", "answer", "output"),
    "messages": ("messages", "conversations"),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "responses": ("responses", "answers", "completions"),
    "ranks": ("ranks", "rank", "ranking"),
    "scores": ("scores", "score", "ratings"),
    "chosen_score": ("chosen_score", "score_chosen"),
    "rejected_score": ("rejected_score", "score_rejected"),
    "score": ("score", "rating"),
    "strength": ("strength", "preference_strength", "margin", "rating"),
    "weight": ("weight", "agreement"),
    "tags": ("tags", "category"),
}


def find(values: dict[str, Any], field: str) -> str | None:
    """Return the name under which the row holds a field, or `None`."""
    return next((name for name in _ALIASES.get(field, (field,)) if name in values), None)


def need(values: dict[str, Any], field: str) -> Any:
    """Return a field that must be there.

    Raises:
        BadRowError: `E_MISSING_FIELD`.
    """
    name = find(values, field)
    if name is None:
        raise BadRowError("E_MISSING_FIELD", f"no field {field!r} among {', '.join(values)}"[:180])
    return values[name]


def text_of(values: dict[str, Any], field: str, *, empty: str) -> str:
    """Return a field that must be text with something in it.

    Raises:
        BadRowError: `E_MISSING_FIELD`, `E_TYPE`, or the code `empty`.
    """
    value = need(values, field)
    if not isinstance(value, str):
        raise BadRowError("E_TYPE", f"{field} is {kind_of(value)}, not text")
    if not value.strip():
        raise BadRowError(empty, f"{field} is empty")
    return value


def prompt_of(values: dict[str, Any]) -> Turns:
    """Return the prompt: a text, a message list, or a dialogue in HH's form.

    Raises:
        BadRowError: It is missing, empty, or its turns are in no good order.
    """
    value = need(values, "prompt")
    if isinstance(value, list):
        return checked_prompt(parse_turns(value, key="prompt"))
    if looks_like_hh(value) or (isinstance(value, str) and value.startswith("\n\nHuman:")):
        turns = parse_hh(value.rstrip().removesuffix("\n\nAssistant:"), key="prompt")
        return checked_prompt(turns)
    return (Message(role="user", content=text_of(values, "prompt", empty="E_EMPTY_PROMPT")),)


def instruction_of(values: dict[str, Any]) -> Turns:
    """Return `instruction` as a prompt, with `input` after an empty line where there is one.

    Raises:
        BadRowError: It is missing, empty or not text.
    """
    instruction = text_of(values, "instruction", empty="E_EMPTY_PROMPT")
    extra_key = find(values, "input")
    extra = values[extra_key] if extra_key else ""
    if extra is None:
        extra = ""
    if not isinstance(extra, str):
        raise BadRowError("E_TYPE", f"input is {kind_of(extra)}, not text")
    has_input = extra.strip() not in ("", "<noinput>")
    content = f"{instruction}\n\n{extra}" if has_input else instruction
    return (Message(role="user", content=content),)


def checked_prompt(turns: Turns) -> Turns:
    """Return turns that make a prompt: something in each, the user's last.

    Raises:
        BadRowError: `E_EMPTY_PROMPT`, `E_ROLE_ORDER` or `E_SYSTEM_POSITION`.
    """
    if not turns:
        raise BadRowError("E_EMPTY_PROMPT", "nothing comes before the response")
    problem = role_problem(turns)
    if problem is not None:
        raise BadRowError(*problem)
    if turns[-1].role != "user":
        raise BadRowError("E_ROLE_ORDER", "the prompt does not end with a user turn")
    for index, turn in enumerate(turns):
        if not turn.content.strip():
            raise BadRowError("E_EMPTY_PROMPT", f"turn {index + 1} of the prompt is empty")
    return turns


def answer_of(values: dict[str, Any], field: str) -> str:
    """Return a response: a text, or a list of one assistant turn.

    Raises:
        BadRowError: It is missing, empty, or more than one assistant turn.
    """
    value = need(values, field)
    if isinstance(value, list):
        turns = parse_turns(value, key=field) if value else ()
        if len(turns) != 1 or turns[0].role != "assistant":
            raise BadRowError("E_ROLE_ORDER", f"{field} is not one assistant turn")
        return checked_answer(turns[0].content, field)
    return text_of(values, field, empty="E_EMPTY_RESPONSE")


def checked_answer(text: str, field: str) -> str:
    """Return a response's text.

    Raises:
        BadRowError: `E_EMPTY_RESPONSE`.
    """
    if not text.strip():
        raise BadRowError("E_EMPTY_RESPONSE", f"{field} is empty")
    return text


def response_text(response: Any, where: str) -> str:
    """Return the text of one of several responses, plain or in an object.

    Raises:
        BadRowError: `E_TYPE` or `E_EMPTY_RESPONSE`.
    """
    if isinstance(response, dict):
        response = next((response[key] for key in ("content", "text", "response") if key in response), None)
    if not isinstance(response, str):
        raise BadRowError("E_TYPE", f"{where} is {kind_of(response)}, not text")
    return checked_answer(response, where)


def numbers_of(values: dict[str, Any], field: str, count: int) -> list[float] | None:
    """Return a field that holds one number a response, `None` where it is not there.

    Raises:
        BadRowError: `E_TYPE`, `E_RANKS` (not one a response) or `E_NON_FINITE`.
    """
    name = find(values, field)
    if name is None or values[name] is None:
        return None
    given = values[name]
    if not isinstance(given, list):
        raise BadRowError("E_TYPE", f"{name} is {kind_of(given)}, not a list")
    if len(given) != count:
        raise BadRowError("E_RANKS", f"{len(given)} {name} for {count} responses")
    return [number_of(number, name) for number in given]


def number_of(value: Any, name: str) -> float:
    """Return a value that must be a finite number.

    Raises:
        BadRowError: `E_TYPE` or `E_NON_FINITE`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError("E_TYPE", f"{name} holds {kind_of(value)}, not a number")
    if not math.isfinite(value):
        raise BadRowError("E_NON_FINITE", f"{name} holds {value}")
    return float(value)


def dense_ranks(values: list[float]) -> tuple[int, ...]:
    """Return 1 for the smallest value, 2 for the next different one, and so on."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return tuple(order[value] for value in values)
