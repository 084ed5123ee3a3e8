"""What a reward source is: sampled responses in, one number each out.

A source is a frozen class whose fields are its parameters. It sees all responses of an iteration at
once, and none of its numbers may depend on anything but them, its parameters and the resources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pipeline_lib.errors import ConfigError
from pipeline_lib.schema import Message

if TYPE_CHECKING:
    from pipeline_lib.text.encode import Tree


@dataclass(frozen=True)
class Sample:
    """One sampled response with what its row says."""

    record_id: str
    prompt: tuple[Message, ...]
    """The dialogue up to the response, as the row has it: not cut."""
    response: str
    """The response's text, without its end-of-turn token."""
    tree: Tree
    """The prompt as the policy saw it, and the response, as token ids."""
    is_finished: bool
    """True where the response ended by itself."""
    tags: tuple[str, ...] = ()
    """What the row is about, e.g. `safe`."""
    reference: str = ""
    """The row's own answer; empty where it has none."""

    @property
    def where(self) -> str:
        """Name the row, for messages."""
        return f"row {self.record_id[:12]}"

    def plain(self) -> dict[str, Any]:
        """Return the sample as JSON values, as programs outside get it."""
        return {
            "id": self.record_id,
            "prompt": [{"role": turn.role, "content": turn.content} for turn in self.prompt],
            "response": self.response,
            "is_finished": self.is_finished,
            "tags": list(self.tags),
            "reference": self.reference,
        }


class ScoresOf(Protocol):
    """Scores trees of one response each with a reward model."""

    def __call__(self, name: str, trees: Sequence[Tree], *, is_raw: bool) -> list[float]:
        """Return a score a tree: the head's output where `is_raw`, else normalised by gain and bias.

        Raises:
            ConfigError: There is no reward model of this name.
        """


class AnswersOf(Protocol):
    """Lets the model that training starts from answer questions."""

    def __call__(self, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Return the most likely answer to each question, put as a dialogue's one user turn."""


def _no_scores(name: str, trees: Sequence[Tree], *, is_raw: bool) -> list[float]:  # noqa: ARG001 - see ScoresOf
    raise ConfigError(f"there is no reward model {name!r} here", next_step="name one of the run's reward models")


def _no_answers(questions: Sequence[str], *, max_new_tokens: int) -> list[str]:  # noqa: ARG001 - see AnswersOf
    raise ConfigError("there is no model to judge with here", next_step="give recorded answers instead")


def _ignore(sample: Sample, reason: str) -> None:
    """Drop a reason."""


def _unlogged(name: str, value: float) -> None:
    """Drop a figure."""


@dataclass(frozen=True)
class Resources:
    """What a source may use that a configuration cannot hold."""

    scores_of: ScoresOf = _no_scores
    answers_of: AnswersOf = _no_answers
    should_stop: Callable[[], bool] = lambda: False
    """True once the process was asked to end; a source that waits asks it between its steps."""
    on_problem: Callable[[Sample, str], None] = _ignore
    """Takes why a sample could not be scored; the source then returns None for it."""
    on_figure: Callable[[str, float], None] = _unlogged
    """Takes a figure of the source's own, which is logged as `reward/<label>_<name>`."""


@runtime_checkable
class RewardSource(Protocol):
    """A reward: one frozen class, its fields its parameters."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return a number a sample, higher is better; None where it could not be scored."""


@runtime_checkable
class UsesRewardModels(Protocol):
    """A source that asks reward models."""

    @property
    def reward_models(self) -> tuple[str, ...]:
        """Names of the run's reward models that it asks; `reward` is the main one."""


@runtime_checkable
class ReadsFiles(Protocol):
    """A source whose numbers depend on files that its parameters only name."""

    def fingerprints(self) -> Mapping[str, str]:
        """Return the sha256 of each of its files by a name for it, so that the stage key sees them.

        Raises:
            ConfigError: A file is not there.
        """
