"""A language model that grades responses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.feedback.answers import ChatEndpoint, read_recorded, recorded_file
from pipeline_lib.hashing import sha256_file, sha256_json
from pipeline_lib.http_json import NoAnswerError
from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen

QUESTION = """\
[Task]
You are an impartial judge. Grade the assistant's answer to the user below: is it helpful, relevant, correct, \
deep enough and as detailed as it should be? Explain your grade in a few sentences. Then give it on a scale of \
{low} to {high}, strictly in this form: "[[grade]]", for example "Rating: [[{middle}]]".

[Conversation]
{conversation}

[The assistant's answer]
{response}
[The end of the assistant's answer]"""
"""What the judge is asked unless a configuration says otherwise; after FastChat's single-answer grading."""

_MARKED = (re.compile(r"\[\[(-?\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(-?\d+(?:\.\d+)?)\]"))
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


class Judge(Frozen):
    """The grade that a language model gives, from 0 for the lowest to 1 for the highest of the scale.

    Answers come from the reference, from a language model behind HTTP, or from a file of recorded answers.

    Source: Zheng et al. 2023 (arXiv 2306.05685), single-answer grading.
    """

    model: Literal["reference"] | None = None
    """reference: the model that training starts from, so that no other is loaded; null where another judge is given."""
    endpoint: ChatEndpoint | None = None
    """A language model in the form of OpenAI's chat completions; its `max_new_tokens` count."""
    recorded: str | None = None
    """JSON lines `{"key": ..., "answer": ...}`; the key is the sha256 that `key_of` gives."""
    question: str = QUESTION
    """What is asked; {conversation}, {response}, {low}, {high} and {middle} are filled in."""
    low: int = 1
    """The lowest grade."""
    high: int = 10
    """The highest grade."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens of the reference's answer, at most."""

    @model_validator(mode="after")
    def _has_one_judge(self) -> Self:
        if sum(judge is not None for judge in (self.model, self.endpoint, self.recorded)) != 1:
            raise ValueError("give one of model, endpoint and recorded")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        if "{response}" not in self.question:
            raise ValueError("question: the judge never sees the {response}")
        return self

    def fingerprints(self) -> Mapping[str, str]:
        """Return the sha256 of the recorded answers.

        Raises:
            ConfigError: The file is not there.
        """
        return {} if self.recorded is None else {self.recorded: sha256_file(recorded_file(self.recorded))}

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the grade of each response on a scale of 0 to 1.

        Raises:
            ConfigError: The recorded answers are not there, or the endpoint's secret is not.
            DataError: A line of the recorded answers cannot be read.
        """
        answers = self._answers(samples, resources)
        return [self._grade(sample, answer, resources) for sample, answer in zip(samples, answers, strict=True)]

    def text_for(self, sample: Sample) -> str:
        """Return what the judge is asked about a sample."""
        conversation = "\n\n".join(f"{_ROLES[turn.role]}: {turn.content}" for turn in sample.prompt)
        values = {
            "conversation": conversation, "response": sample.response, "low": str(self.low), "high": str(self.high),
            "middle": str((self.low + self.high) // 2),
        }  # fmt: skip
        # One pass over the question: braces in the texts stay what they are.
        return re.sub(
            "|".join(rf"\{{{name}\}}" for name in values), lambda found: values[found[0][1:-1]], self.question
        )

    def _answers(self, samples: Sequence[Sample], resources: Resources) -> Sequence[str | None]:
        if self.recorded is not None:
            recorded = read_recorded(recorded_file(self.recorded))
            found = [recorded.get(key_of(sample)) for sample in samples]
            for sample, answer in zip(samples, found, strict=True):
                if answer is None:
                    resources.on_problem(sample, f"the recorded answers have none for {key_of(sample)[:12]}")
            return found
        questions = [self.text_for(sample) for sample in samples]
        if self.endpoint is None:
            return resources.answers_of(questions, max_new_tokens=self.max_new_tokens)
        chat = self.endpoint.open(resources.should_stop)
        answers: list[str | None] = []
        for sample, given in zip(samples, chat.ask_all(questions), strict=True):
            if isinstance(given, NoAnswerError):
                resources.on_problem(sample, chat.failure(given))
            answers.append(None if isinstance(given, NoAnswerError) else given)
        return answers

    def _grade(self, sample: Sample, answer: str | None, resources: Resources) -> float | None:
        if answer is None:
            return None
        grades = next((found for mark in _MARKED if (found := mark.findall(answer))), [])
        grade = float(grades[0]) if grades else None
        if grade is None or not self.low <= grade <= self.high:
            shown = " ".join(answer.split())[-80:]
            resources.on_problem(sample, f"the judge gave no grade of {self.low} to {self.high}: {shown!r}")
            return None
        return (grade - self.low) / (self.high - self.low)


def key_of(sample: Sample) -> str:
    """Return the name of a (prompt, response) in a file of recorded answers: the sha256 of their texts."""
    return sha256_json([[[turn.role, turn.content] for turn in sample.prompt], sample.response])
