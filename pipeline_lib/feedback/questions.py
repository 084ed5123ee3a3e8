"""What a judge is asked about the responses to a prompt, and what of its answer is a verdict.

Every set of responses is asked about in two orders, because judges favour what they read first. A
verdict is read strictly or not at all: an answer without one, or with two that differ, is never guessed.

Legend: K responses; a standing is a number a response, higher is better, in the order of the responses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from pipeline_lib.errors import ConfigError
from pipeline_lib.feedback.answers import key_of_question
from pipeline_lib.schema import Message

Form = Literal["pair", "rank", "rate"]
Scale = Literal["1-5", "1-7", "1-10", "1-100", "A-D"]
NoVerdict = Literal["missing", "contradicting", "unfitting", "unanswered"]
"""Why there is no verdict: none is there, several that differ, one that does not fit, no answer at all."""

VERSION = 1
"""Of the questions below `templates`: other words are another version, so that verdicts can be told apart."""

_MARK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_LETTERS = "ABCD"
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
_VERDICTS = {"A": (1.0, 0.0), "B": (0.0, 1.0), "C": (0.5, 0.5)}
_PLACES = frozenset({"conversation", "answers", "count", "scale", "example"})
_SHOWN_CHARACTERS = 80


class NoVerdictError(Exception):
    """An answer of a judge that holds no verdict, and why."""

    def __init__(self, kind: NoVerdict, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Question:
    """One question about responses in one order."""

    order: tuple[int, ...]
    """Places of the responses as they are shown."""
    text: str

    @property
    def key(self) -> str:
        """Its name among kept and recorded answers."""
        return key_of_question(self.text)


@dataclass(frozen=True)
class Asking:
    """A form of question with its words."""

    form: Form
    scale: Scale
    template: str
    """The words; {conversation}, {answers}, {count}, {scale} and {example} are filled in."""

    @classmethod
    def of(cls, form: Form, scale: Scale, file: str | None) -> Asking:
        """Take the words of a file, or those that come with the program.

        Raises:
            ConfigError: The file is not there, or shows the judge no answers.
        """
        path = Path(__file__).with_name("templates") / f"{form}-v{VERSION}.txt"
        if file is not None:
            path = Path(file).expanduser()
            if not path.is_file():
                raise ConfigError(f"there is no question for the judge at {file}", next_step="give a text file")
        template = path.read_text(encoding="utf-8")
        if "{answers}" not in template:
            raise ConfigError(
                f"{path}: the judge never sees the {{answers}}", next_step="put {answers} where they are to stand"
            )
        return cls(form, scale, template)

    def questions(self, conversation: Sequence[Message], responses: Sequence[str]) -> list[Question]:
        """Return what is asked about K responses: each pair, or all of them at once, in both orders.

        One response is rated once and compared with nothing.
        """
        places = range(len(responses))
        orders: list[tuple[int, ...]]
        if self.form == "pair":
            orders = [order for pair in combinations(places, 2) for order in (pair, pair[::-1])]
        elif len(responses) == 1:
            orders = [(0,)] if self.form == "rate" else []
        else:
            orders = [tuple(places), tuple(reversed(places))]
        return [Question(order, self._text(conversation, [responses[place] for place in order])) for order in orders]

    def standing(self, question: Question, answer: str) -> dict[int, float]:
        """Return what an answer says of each response that was shown, by its place; higher is better.

        A pair: 1 for the better response, 0 for the worse, 0.5 for a tie. A ranking: minus the place in it.
        A rating: the mark on the scale of 0 to 1.

        Raises:
            NoVerdictError: The answer holds no verdict, several that differ, or one that does not fit.
        """
        marks = list(dict.fromkeys(mark.strip() for mark in _MARK.findall(answer)))
        if len(marks) != 1:
            shown = " ".join(answer.split())[-_SHOWN_CHARACTERS:]
            if marks:
                raise NoVerdictError("contradicting", f"verdicts that differ: {', '.join(marks)}"[:_SHOWN_CHARACTERS])
            raise NoVerdictError("missing", f"no verdict: {shown!r}")
        read = {"pair": self._read_pair, "rank": _read_ranking, "rate": self._read_ratings}[self.form]
        return dict(zip(question.order, read(marks[0], len(question.order)), strict=True))

    def _text(self, conversation: Sequence[Message], shown: Sequence[str]) -> str:
        is_pair = self.form == "pair"
        names = (
            [f"assistant {letter}" for letter in "AB"] if is_pair else [f"assistant {k + 1}" for k in range(len(shown))]
        )
        blocks = [
            f"[The answer of {name}]\n{text}\n[The end of the answer of {name}]"
            for name, text in zip(names, shown, strict=True)
        ]
        values = {
            "conversation": "\n\n".join(f"{_ROLES[turn.role]}: {turn.content}" for turn in conversation),
            "answers": "\n\n".join(blocks), "count": str(len(shown)), "scale": self._scale_in_words(),
            "example": self._example(len(shown)),
        }  # fmt: skip
        return _filled(self.template, values)

    def _scale_in_words(self) -> str:
        if self.scale == "A-D":
            return "by a letter: A for flawless, B for minor flaws, C for severe flaws, D for a useless answer"
        low, high = self.scale.split("-")
        return f"on a scale of {low} to {high}, a higher number for a better answer"

    def _example(self, count: int) -> str:
        if self.form == "rank":
            return " > ".join(str(place) for place in range(count, 0, -1))
        letters = [_LETTERS[place % len(_LETTERS)] for place in range(count)]
        high = 4 if self.scale == "A-D" else int(self.scale.split("-")[1])
        return ", ".join(
            letters if self.scale == "A-D" else [str(max(1, high - 1 - place % high)) for place in range(count)]
        )

    def _read_pair(self, mark: str, _: int) -> tuple[float, ...]:
        if mark not in _VERDICTS:
            raise NoVerdictError("unfitting", f"{mark[:_SHOWN_CHARACTERS]!r} is none of A, B and C")
        return _VERDICTS[mark]

    def _read_ratings(self, mark: str, count: int) -> tuple[float, ...]:
        words = [word.strip() for word in mark.split(",")]
        if len(words) != count:
            raise NoVerdictError("unfitting", f"{len(words)} ratings for {count} answers: {mark[:_SHOWN_CHARACTERS]!r}")
        return tuple(self._rating(word) for word in words)

    def _rating(self, word: str) -> float:
        if self.scale == "A-D":
            if len(word) != 1 or word not in _LETTERS:
                raise NoVerdictError("unfitting", f"{word[:_SHOWN_CHARACTERS]!r} is none of A, B, C and D")
            return 1 - _LETTERS.index(word) / (len(_LETTERS) - 1)
        low, high = map(int, self.scale.split("-"))
        value = float(word) if _NUMBER.fullmatch(word) else None
        if value is None or not low <= value <= high:
            raise NoVerdictError("unfitting", f"{word[:_SHOWN_CHARACTERS]!r} is no number of {low} to {high}")
        return (value - low) / (high - low)


def _read_ranking(mark: str, count: int) -> tuple[float, ...]:
    """Read `2 > 1 = 3`."""
    groups = [[word.strip() for word in group.split("=")] for group in mark.split(">")]
    named = [word for group in groups for word in group]
    if sorted(named) != sorted(str(place + 1) for place in range(count)):
        raise NoVerdictError("unfitting", f"{mark[:_SHOWN_CHARACTERS]!r} does not name each of {count} answers once")
    places = {word: place for place, group in enumerate(groups) for word in group}
    return tuple(-float(places[str(number + 1)]) for number in range(count))


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Fill a template in one pass: braces in the texts stay what they are."""
    assert values.keys() == _PLACES
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], template)
