"""Judges behind HTTP for tests: they answer as OpenAI's chat completions do, on the scorer's server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tests.unit.training.reward_server import Answer, Scorer

_SHOWN = re.compile(r"\[The answer of assistant \w+\]\n(.*?)\n\[The end of the answer of assistant \w+\]", re.DOTALL)
Opinion = Callable[[Sequence[str]], str]
"""From the answers in the order in which they are shown to what the judge says."""


def shown_in(body: Any) -> list[str]:
    """The answers that a question shows."""
    return _SHOWN.findall(body["messages"][0]["content"])


def saying(opinion: Opinion) -> Callable[[Any], Answer]:
    """A judge of this opinion."""

    def answer(body: Any) -> Answer:
        text = opinion(shown_in(body))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()

    return answer


def comparing(worth: Callable[[str], Any]) -> Opinion:
    """Prefers the answer of two that is worth more."""

    def opinion(shown: Sequence[str]) -> str:
        first, second = map(worth, shown)
        return f"Well. [[{'C' if first == second else 'A' if first > second else 'B'}]]"

    return opinion


def ordering(worth: Callable[[str], Any]) -> Opinion:
    """Orders answers by what they are worth."""

    def opinion(shown: Sequence[str]) -> str:
        levels = sorted({worth(text) for text in shown}, reverse=True)
        groups = [[str(n + 1) for n, text in enumerate(shown) if worth(text) == level] for level in levels]
        return f"[[{' > '.join(' = '.join(group) for group in groups)}]]"

    return opinion


longer = comparing(len)


def endpoint(served: Scorer, **how: Any) -> dict[str, Any]:
    """The configuration of a judge on this server."""
    return {"url": served.url, "model": "judge", "backoff_s": 0, "at_once": 2, **how}
