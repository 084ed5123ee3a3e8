"""The common layouts of preference and instruction data: one function each, fields in, `Mapped` out.

Every function raises `BadRowError` with its own code for a field that is missing, of the wrong
type, empty, or that contradicts another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline_lib.data.compared import looks_compared, looks_like_systems, map_compared, map_systems
from pipeline_lib.data.dialogue import Turns, kind_of, looks_like_hh, parse_hh, parse_turns, shared_prompt
from pipeline_lib.data.fields import (
    answer_of,
    checked_answer,
    checked_prompt,
    dense_ranks,
    find,
    instruction_of,
    need,
    number_of,
    numbers_of,
    prompt_of,
    response_text,
)
from pipeline_lib.data.labels import Mapped, scores_of_objects, single_score
from pipeline_lib.data.refusal import BadRowError


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
    if _looks_ranked(values):
        return "ranked"
    if looks_like_systems(values):
        return "systems"
    if looks_compared(values):
        return "compared"
    if find(values, "messages"):
        return "messages"
    if "instruction" in values and find(values, "output"):
        return "alpaca"
    if find(values, "prompt") and find(values, "response") and isinstance(values.get("label"), bool):
        return "rated"
    if find(values, "prompt"):
        return "prompt_completion" if find(values, "response") else "prompt"
    return None


def map_prompt_completion(values: dict[str, Any]) -> Mapped:
    """Map `prompt` and `response`, each text or a message list (TRL's conversational form)."""
    return Mapped(prompt_of(values), (answer_of(values, "response"),), scores=single_score(values))


def map_rated(values: dict[str, Any]) -> Mapped:
    """Map `prompt`, `response` and `label`, true where the response is wanted (TRL's unpaired form)."""
    label = need(values, "label")
    if not isinstance(label, bool):
        raise BadRowError("E_TYPE", f"label is {kind_of(label)}, neither true nor false")
    return Mapped(prompt_of(values), (answer_of(values, "response"),), scores=single_score(values), desirable=label)


def map_messages(values: dict[str, Any]) -> Mapped:
    """Map `messages`: the last assistant turn is the response, what comes before is the prompt."""
    turns = parse_turns(need(values, "messages"), key="messages")
    if turns[-1].role != "assistant":
        raise BadRowError("E_NO_ASSISTANT", f"the last turn is of the {turns[-1].role}, not the assistant")
    answer = checked_answer(turns[-1].content, "the last turn")
    return Mapped(checked_prompt(turns[:-1]), (answer,), scores=single_score(values))


def map_alpaca(values: dict[str, Any]) -> Mapped:
    """Map `instruction`, `input` and `output`; an input follows the instruction after an empty line."""
    return Mapped(instruction_of(values), (answer_of(values, "output"),), scores=single_score(values))


def map_preference(values: dict[str, Any]) -> Mapped:
    """Map `chosen` and `rejected`, with a `prompt` or with a prompt they share.

    Whole dialogues (message lists) share a prefix, which is the prompt. Scores, where there are
    any, must agree with the order; equal scores make a tie.
    """
    chosen, rejected = need(values, "chosen"), need(values, "rejected")
    if _is_dialogue(chosen) and _is_dialogue(rejected):
        prompt, best, worst = shared_prompt(parse_turns(chosen, key="chosen"), parse_turns(rejected, key="rejected"))
        _check_same_prompt(values, prompt)
        prompt = checked_prompt(prompt)
    else:
        prompt = prompt_of(values)
        best, worst = answer_of(values, "chosen"), answer_of(values, "rejected")
    responses = (checked_answer(best, "chosen"), checked_answer(worst, "rejected"))
    scores = _pair_scores(values)
    return Mapped(prompt, responses, (1, 1) if scores and scores[0] == scores[1] else (1, 2), scores=scores)


def map_hh(values: dict[str, Any]) -> Mapped:
    r"""Map `chosen` and `rejected` dialogues of `\n\nHuman:` and `\n\nAssistant:` turns."""
    chosen = parse_hh(need(values, "chosen"), key="chosen")
    rejected = parse_hh(need(values, "rejected"), key="rejected")
    prompt, best, worst = shared_prompt(chosen, rejected)
    responses = (checked_answer(best, "chosen"), checked_answer(worst, "rejected"))
    return Mapped(checked_prompt(prompt), responses, (1, 2))


def map_prompt(values: dict[str, Any]) -> Mapped:
    """Map `prompt` alone."""
    return Mapped(prompt_of(values))


def map_ranked(values: dict[str, Any]) -> Mapped:
    """Map `responses` with `ranks` (1 the best, ties allowed) or `scores` (higher is better).

    Responses that are objects may hold their own score, or upvotes as Stack Exchange has them.
    """
    responses = need(values, "responses")
    if not isinstance(responses, list):
        raise BadRowError("E_TYPE", f"responses is {kind_of(responses)}, not a list")
    if len(responses) < 2:
        raise BadRowError("E_RANKS", f"{len(responses)} responses; a ranking needs two or more")
    texts = tuple(response_text(response, f"responses[{k}]") for k, response in enumerate(responses))
    ranks, scores = numbers_of(values, "ranks", len(texts)), numbers_of(values, "scores", len(texts))
    scores = scores_of_objects(responses) if scores is None else scores
    if ranks is None and scores is None:
        raise BadRowError("E_MISSING_FIELD", "neither ranks nor scores")
    by_score = dense_ranks([-score for score in scores]) if scores is not None else None
    by_rank = dense_ranks(ranks) if ranks is not None else by_score
    if by_score is not None and by_score != by_rank:
        raise BadRowError("E_SCORE_ORDER", "the scores disagree with the ranks")
    assert by_rank is not None
    return Mapped(prompt_of(values), texts, by_rank, scores=tuple(scores or ()))


LAYOUTS: dict[str, Callable[[dict[str, Any]], Mapped]] = {
    "prompt_completion": map_prompt_completion,
    "rated": map_rated,
    "messages": map_messages,
    "alpaca": map_alpaca,
    "preference": map_preference,
    "hh": map_hh,
    "prompt": map_prompt,
    "ranked": map_ranked,
    "compared": map_compared,
    "systems": map_systems,
}


def _looks_ranked(values: dict[str, Any]) -> bool:
    name = find(values, "responses")
    if name is None:
        return False
    if find(values, "ranks") or find(values, "scores"):
        return True
    responses = values[name]
    # A row that is wrong in a response has its layout all the same, and is refused with a better reason.
    return isinstance(responses, list) and all(isinstance(response, dict) for response in responses) and any(
        key in response for response in responses for key in ("score", "pm_score", "upvotes")
    )  # fmt: skip


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


def _pair_scores(values: dict[str, Any]) -> tuple[float, ...]:
    """Return the scores of chosen and rejected, empty where the row has none."""
    names = find(values, "chosen_score"), find(values, "rejected_score")
    if names[0] is None or names[1] is None or values[names[0]] is None or values[names[1]] is None:
        return ()
    best, worst = number_of(values[names[0]], names[0]), number_of(values[names[1]], names[1])
    if best < worst:
        raise BadRowError("E_SCORE_ORDER", f"chosen has the score {best:g}, rejected the higher {worst:g}")
    return (best, worst)
