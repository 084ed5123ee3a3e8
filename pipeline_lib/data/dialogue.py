"""Turns of a dialogue: from message lists of any common dialect, and from HH's plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline_lib.data.refusal import BadRowError, Refusal
from pipeline_lib.schema import Message, Role

_ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_HH_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}

Turns = tuple[Message, ...]


def role_problem(turns: Sequence[Message]) -> Refusal | None:
    """Tell what is wrong with the order of a dialogue's turns, or `None`.

    Right is: at most one system turn, at the start; then user and assistant in turn, user first.
    """
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            return Refusal("E_SYSTEM_POSITION", f"turn {index + 1} is a system turn; only the first may be one")
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken or spoken[0].role != "user":
        return Refusal("E_ROLE_ORDER", "the dialogue does not begin with a user turn")
    for index in range(1, len(spoken)):
        if spoken[index].role == spoken[index - 1].role:
            return Refusal("E_ROLE_ORDER", f"two {spoken[index].role} turns in a row")
    return None


def parse_turns(value: Any, *, key: str) -> Turns:
    """Read a list of `{role, content}` (or `{from, value}`) into turns.

    Raises:
        BadRowError: `E_TYPE`, `E_MISSING_FIELD`, `E_EMPTY_PROMPT` or `E_ROLE_UNKNOWN`.
    """
    if not isinstance(value, list):
        raise BadRowError("E_TYPE", f"{key} is {kind_of(value)}, not a list of messages")
    if not value:
        raise BadRowError("E_EMPTY_PROMPT", f"{key} is an empty list")
    return tuple(_parse_turn(turn, where=f"{key}[{index}]") for index, turn in enumerate(value))


def parse_hh(value: Any, *, key: str) -> Turns:
    r"""Read `\n\nHuman: … \n\nAssistant: …` into turns, white space around each turn stripped.

    Raises:
        BadRowError: `E_TYPE`, or `E_HH_FORMAT` where the text does not begin with a speaker.
    """
    if not isinstance(value, str):
        raise BadRowError("E_TYPE", f"{key} is {kind_of(value)}, not text")
    parts = _HH_SPEAKER.split(value if value.startswith("\n\n") else "\n\n" + value.lstrip("\n"))
    if parts[0].strip() or len(parts) < 3:
        raise BadRowError("E_HH_FORMAT", f"{key} does not begin with 'Human:' or 'Assistant:'")
    return tuple(
        Message(role=_HH_ROLES[speaker], content=text.strip())
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True)
    )


def looks_like_hh(value: Any) -> bool:
    """Tell whether a text is a dialogue in HH's form."""
    return isinstance(value, str) and value.lstrip().startswith(("Human:", "Assistant:")) and "\n\nAssistant:" in value


def shared_prompt(chosen: Turns, rejected: Turns) -> tuple[Turns, str, str]:
    """Split two dialogues into their common prompt and the one answer each gives to it.

    The prompt is the longest common prefix of whole turns that ends with a user turn. Where a
    dialogue goes on past its first answer, nobody judged that answer alone: the pair is refused.

    Raises:
        BadRowError: `E_NO_SHARED_PROMPT` or `E_DIVERGED`.
    """
    limit = min(len(chosen), len(rejected)) - 1
    length = 0
    for index in range(limit):
        if chosen[index] != rejected[index]:
            break
        if chosen[index].role == "user":
            length = index + 1
    if length == 0:
        raise BadRowError("E_NO_SHARED_PROMPT", "chosen and rejected do not begin with the same user turn")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != length + 1 or turns[length].role != "assistant":
            raise BadRowError(
                "E_DIVERGED", f"after the shared prompt of {length} turns {name} is not one assistant turn"
            )
    return chosen[:length], chosen[length].content, rejected[length].content


def kind_of(value: Any) -> str:
    """Name a JSON value's type for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _parse_turn(turn: Any, *, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError("E_TYPE", f"{where} is {kind_of(turn)}, not a message")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role is None:
        raise BadRowError("E_MISSING_FIELD", f"{where} has no role")
    if not isinstance(role, str) or role not in _ROLE_NAMES:
        raise BadRowError("E_ROLE_UNKNOWN", f"{where} has the unknown role {role!r}")
    return Message(role=_ROLE_NAMES[role], content=_text_of(content, where=where))


def _text_of(content: Any, *, where: str) -> str:
    """Return a message's text; of a list of parts, those of type text alone may be there."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) == len(content):
            return "".join(texts)
        raise BadRowError("E_TYPE", f"{where} holds parts that are not text")
    raise BadRowError("E_TYPE", f"the content of {where} is {kind_of(content)}, not text")
