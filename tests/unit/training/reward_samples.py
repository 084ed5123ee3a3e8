"""Samples for the tests of reward sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline_lib.schema import Message
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.rewards import REWARD_SOURCES
from pipeline_lib.training.rewards.contract import Resources, Sample


def sample(response: str, *, name: str = "row", prompt: str = "Why?", **how: Any) -> Sample:
    """A sample whose token ids are its bytes, with one more for its end."""
    given = {"is_finished": True, **how}
    ids = (*response.encode(), *([0] if given["is_finished"] else []))
    tree = Tree(name, (1, 2), (ids,), (False, False))
    return Sample(name, (Message(role="user", content=prompt),), response, tree, **given)


def samples(*responses: str) -> list[Sample]:
    """Samples named row0, row1, ..."""
    return [sample(text, name=f"row{place}") for place, text in enumerate(responses)]


@dataclass
class Heard:
    """Resources that remember what they are told."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def resources(self, **how: Any) -> Resources:
        return Resources(
            on_problem=lambda one, reason: self.problems.append((one.record_id, reason)),
            on_figure=self.figures.__setitem__,
            **how,
        )


def scored(spec: dict[str, Any], given: Sequence[Sample], resources: Resources | None = None) -> list[float | None]:
    """Score samples with one source."""
    return list(REWARD_SOURCES.build(spec).score(given, resources or Resources()))
