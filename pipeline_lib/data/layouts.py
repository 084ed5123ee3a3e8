"""The common layouts of preference and instruction data: one function each, fields in, `Mapped` out.

Every function raises `BadRowError` with its own code for a field that is missing, of the wrong
type, empty, or that contradicts another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline_lib.data.dialogue import (
    Turns,
    kind_of,
    looks_like_hh,
    parse_hh,
    parse_turns,
    role_problem,
    shared_prompt,
)
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
}


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a layout finds in a row."""

    prompt: Turns
    responses: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()


def rename(values: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Return the row with the configured fields under their canonical names.

    A field that another name is taken from keeps its own name too, unless that name is wanted.
    """
    if not fields:
        return values
    taken = {canonical: values[own] for canonical, own in fields.items() if own in values}
    kept = {key: value for key, value in values.items() if key not in fields}
    return kept | taken


def detect(values: dict[str, Any]) -> str | None:
    """Tell which layout a row has, by its field names and the form of its dialogues."""
    chosen = values.get("chosen")
    if chosen is not None and "rejected" in values:
        return "hh" if "prompt" not in values and looks_like_hh(chosen) else "preference"
    if _find(values, "responses") and (_find(values, "ranks") or _find(values, "scores")):
        return "ranked"
    if _find(values, "messages"):
        return "messages"
    if "instruction" in values and _find(values, "output"):
        return "alpaca"
    if _find(values, "prompt"):
        return "prompt_completion" if _find(values, "response") else "prompt"
    return None


def map_prompt_completion(values: dict[str, Any]) -> Mapped:
    """Map `prompt` and `response`, each text or a message list (TRL's conversational form)."""
    return Mapped(_prompt(values), (_answer(values, "response"),))


def map_messages(values: dict[str, Any]) -> Mapped:
    """Map `messages`: the last assistant turn is the response, what comes before is the prompt."""
    turns = parse_turns(_need(values, "messages"), key="messages")
    if turns[-1].role != "assistant":
        raise BadRowError("E_NO_ASSISTANT", f"the last turn is of the {turns[-1].role}, not the assistant")
    return Mapped(_checked_prompt(turns[:-1]), (_checked_answer(turns[-1].content, "the last turn"),))


def map_alpaca(values: dict[str, Any]) -> Mapped:
    """Map `instruction`, `input` and `output`; an input follows the instruction after an empty line."""
    instruction = _text(values, "instruction", empty="E_EMPTY_PROMPT")
    extra_key = _find(values, "input")
    extra = values[extra_key] if extra_key else ""
    if extra is None:
        extra = ""
    if not isinstance(extra, str):
        raise BadRowError("E_TYPE", f"input is {kind_of(extra)}, not text")
    has_input = extra.strip() not in ("", "<noinput>")
    content = f"{instruction}\n\n{extra}" if has_input else instruction
    return Mapped((Message(role="user", content=content),), (_answer(values, "output"),))


def map_preference(values: dict[str, Any]) -> Mapped:
    """Map `chosen` and `rejected`, with a `prompt` or with a prompt they share.

    Whole dialogues (message lists) share a prefix, which is the prompt. Scores, where there are
    any, must agree with the order; equal scores make a tie.
    """
    chosen, rejected = _need(values, "chosen"), _need(values, "rejected")
    if _is_dialogue(chosen) and _is_dialogue(rejected):
        prompt, best, worst = shared_prompt(parse_turns(chosen, key="chosen"), parse_turns(rejected, key="rejected"))
        _check_same_prompt(values, prompt)
        prompt = _checked_prompt(prompt)
    else:
        prompt = _prompt(values)
        best, worst = _answer(values, "chosen"), _answer(values, "rejected")
    responses = (_checked_answer(best, "chosen"), _checked_answer(worst, "rejected"))
    return Mapped(prompt, responses, _pair_ranks(values))


def map_hh(values: dict[str, Any]) -> Mapped:
    r"""Map `chosen` and `rejected` dialogues of `\n\nHuman:` and `\n\nAssistant:` turns."""
    chosen = parse_hh(_need(values, "chosen"), key="chosen")
    rejected = parse_hh(_need(values, "rejected"), key="rejected")
    prompt, best, worst = shared_prompt(chosen, rejected)
    responses = (_checked_answer(best, "chosen"), _checked_answer(worst, "rejected"))
    return Mapped(_checked_prompt(prompt), responses, (1, 2))


def map_prompt(values: dict[str, Any]) -> Mapped:
    """Map `prompt` alone."""
    return Mapped(_prompt(values))


def map_ranked(values: dict[str, Any]) -> Mapped:
    """Map `responses` with `ranks` (1 the best, ties allowed) or `scores` (higher is better)."""
    responses = _need(values, "responses")
    if not isinstance(responses, list):
        raise BadRowError("E_TYPE", f"responses is {kind_of(responses)}, not a list")
    if len(responses) < 2:
        raise BadRowError("E_RANKS", f"{len(responses)} responses; a ranking needs two or more")
    texts = tuple(_response_text(response, f"responses[{k}]") for k, response in enumerate(responses))
    ranks, scores = _numbers(values, "ranks", len(texts)), _numbers(values, "scores", len(texts))
    if ranks is None and scores is None:
        raise BadRowError("E_MISSING_FIELD", "neither ranks nor scores")
    by_score = _dense_ranks([-score for score in scores]) if scores is not None else None
    by_rank = _dense_ranks(ranks) if ranks is not None else by_score
    if by_score is not None and by_score != by_rank:
        raise BadRowError("E_SCORE_ORDER", "the scores disagree with the ranks")
    assert by_rank is not None
    return Mapped(_prompt(values), texts, by_rank)


LAYOUTS: dict[str, Callable[[dict[str, Any]], Mapped]] = {
    "prompt_completion": map_prompt_completion,
    "messages": map_messages,
    "alpaca": map_alpaca,
    "preference": map_preference,
    "hh": map_hh,
    "prompt": map_prompt,
    "ranked": map_ranked,
}


def _find(values: dict[str, Any], field: str) -> str | None:
    """Return the name under which the row holds a field, or `None`."""
    return next((name for name in _ALIASES.get(field, (field,)) if name in values), None)


def _need(values: dict[str, Any], field: str) -> Any:
    name = _find(values, field)
    if name is None:
        raise BadRowError("E_MISSING_FIELD", f"no field {field!r} among {', '.join(values)}"[:180])
    return values[name]


def _text(values: dict[str, Any], field: str, *, empty: str) -> str:
    value = _need(values, field)
    if not isinstance(value, str):
        raise BadRowError("E_TYPE", f"{field} is {kind_of(value)}, not text")
    if not value.strip():
        raise BadRowError(empty, f"{field} is empty")
    return value


def _prompt(values: dict[str, Any]) -> Turns:
    value = _need(values, "prompt")
    if isinstance(value, list):
        return _checked_prompt(parse_turns(value, key="prompt"))
    if looks_like_hh(value) or (isinstance(value, str) and value.startswith("\n\nHuman:")):
        turns = parse_hh(value.rstrip().removesuffix("\n\nAssistant:"), key="prompt")
        return _checked_prompt(turns)
    return (Message(role="user", content=_text(values, "prompt", empty="E_EMPTY_PROMPT")),)


def _checked_prompt(turns: Turns) -> Turns:
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


def _answer(values: dict[str, Any], field: str) -> str:
    value = _need(values, field)
    if isinstance(value, list):
        turns = parse_turns(value, key=field) if value else ()
        if len(turns) != 1 or turns[0].role != "assistant":
            raise BadRowError("E_ROLE_ORDER", f"{field} is not one assistant turn")
        return _checked_answer(turns[0].content, field)
    return _text(values, field, empty="E_EMPTY_RESPONSE")


def _checked_answer(text: str, field: str) -> str:
    if not text.strip():
        raise BadRowError("E_EMPTY_RESPONSE", f"{field} is empty")
    return text


def _response_text(response: Any, where: str) -> str:
    if isinstance(response, dict):
        response = next((response[key] for key in ("content", "text", "response") if key in response), None)
    if not isinstance(response, str):
        raise BadRowError("E_TYPE", f"{where} is {kind_of(response)}, not text")
    return _checked_answer(response, where)


def _is_dialogue(value: Any) -> bool:
    """Tell whether a message list holds the prompt too, and not the one answer alone."""
    return isinstance(value, list) and len(value) >= 2


def _check_same_prompt(values: dict[str, Any], prompt: Turns) -> None:
    """Refuse a row whose own `prompt` is not the one its dialogues share."""
    given = values.get("prompt")
    if isinstance(given, str) and given.strip() and given.strip() != prompt[-1].content.strip():
        raise BadRowError("E_PROMPT_MISMATCH", "prompt is not the last user turn of chosen and rejected")
    if isinstance(given, list) and given and parse_turns(given, key="prompt") != prompt:
        raise BadRowError("E_PROMPT_MISMATCH", "prompt is not what chosen and rejected share")


def _pair_ranks(values: dict[str, Any]) -> tuple[int, int]:
    names = _find(values, "chosen_score"), _find(values, "rejected_score")
    if names[0] is None or names[1] is None or values[names[0]] is None or values[names[1]] is None:
        return (1, 2)
    best, worst = _number(values[names[0]], names[0]), _number(values[names[1]], names[1])
    if best < worst:
        raise BadRowError("E_SCORE_ORDER", f"chosen has the score {best:g}, rejected the higher {worst:g}")
    return (1, 1) if best == worst else (1, 2)


def _numbers(values: dict[str, Any], field: str, count: int) -> list[float] | None:
    name = _find(values, field)
    if name is None or values[name] is None:
        return None
    given = values[name]
    if not isinstance(given, list):
        raise BadRowError("E_TYPE", f"{name} is {kind_of(given)}, not a list")
    if len(given) != count:
        raise BadRowError("E_RANKS", f"{len(given)} {name} for {count} responses")
    return [_number(number, name) for number in given]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError("E_TYPE", f"{name} holds {kind_of(value)}, not a number")
    if not math.isfinite(value):
        raise BadRowError("E_NON_FINITE", f"{name} holds {value}")
    return float(value)


def _dense_ranks(values: list[float]) -> tuple[int, ...]:
    """Return 1 for the smallest value, 2 for the next different one, and so on."""
    order = {value: rank for rank, value in enumerate(sorted(set(values)), start=1)}
    return tuple(order[value] for value in values)
