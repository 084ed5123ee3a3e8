"""Where a judge's answers come from: a language model behind HTTP, or a file of recorded answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.hashing import sha256_json
from pipeline_lib.http_json import HttpJson, NoAnswerError, RefusedError, SilentError, check_url, json_headers
from pipeline_lib.validation import Frozen

SECRET_PREFIX = "PREFLINE_JUDGE_"  # noqa: S105 - the beginning of variables' names, no secret
"""Variables that may be sent: a configuration must not get at the other keys of the environment."""


class ChatEndpoint(Frozen):
    """A language model that answers in the form of OpenAI's chat completions, as vLLM and most services do."""

    url: str = Field(pattern=r"^https?://[^\s/]+")
    """Where to post, e.g. `https://judge.example/v1/chat/completions`."""
    model: str = Field(min_length=1)
    """Name of the model there."""
    version: str = ""
    """Which version of the model this is: another word is another judge, so it is asked anew."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Sampling temperature of its answers."""
    max_new_tokens: int = Field(512, ge=1)
    """Tokens of an answer, at most."""
    extra: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further fields of each request, e.g. `{seed: 1}`."""
    at_once: int = Field(4, ge=1, le=256)
    """Questions that are open at once."""
    timeout_s: float = Field(120.0, gt=0, le=3600)
    """Seconds without a word after which a request has failed."""
    retries: int = Field(4, ge=0, le=20)
    """Tries after the first, where the service is busy, broken or away."""
    backoff_s: float = Field(1.0, ge=0, le=600)
    """Wait before the second try; it doubles with every further one, up to a minute."""
    auth_variable: str | None = Field(None, pattern=f"^{SECRET_PREFIX}[A-Z0-9_]+$")
    """Environment variable that holds the service's API key, e.g. `PREFLINE_JUDGE_KEY`."""

    @model_validator(mode="after")
    def _keeps_its_secret(self) -> Self:
        check_url(self.url, auth_variable=self.auth_variable)
        return self

    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on."""
        return self.model_dump(
            mode="json", include={"url", "model", "version", "temperature", "max_new_tokens", "extra"}
        )

    def open(self, should_stop: Callable[[], bool] = lambda: False) -> Chat:
        """Return the line to it; nothing is asked yet.

        Raises:
            ConfigError: The variable of `auth_variable` is not set.
        """
        headers = json_headers(self.auth_variable, whose="judge", prefix="Bearer ")
        service = HttpJson(self.url, headers, self.timeout_s, self.retries, self.backoff_s, should_stop=should_stop)
        return Chat(self, service)


@dataclass(frozen=True)
class Chat:
    """An open line to a language model."""

    endpoint: ChatEndpoint
    service: HttpJson

    def ask(self, question: str) -> str:
        """Return the answer to a question, put as a dialogue's one user turn.

        Raises:
            NoAnswerError: It did not answer, refused, or answered in another form.
        """
        chosen = self.endpoint
        body = {
            "model": chosen.model, "messages": [{"role": "user", "content": question}],
            "temperature": chosen.temperature, "max_tokens": chosen.max_new_tokens, **chosen.extra,
        }  # fmt: skip
        content = self.service.post(body)
        try:
            answer = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            answer = None
        if not isinstance(answer, str):
            raise RefusedError("without choices[0].message.content")
        return answer

    def failure(self, error: NoAnswerError) -> str:
        """Say in one line what went wrong, with the place."""
        verb = " answered" if isinstance(error, RefusedError) else ""
        return f"{self.service.shown}{verb} {error}"

    def ask_all(self, questions: Sequence[str]) -> list[str | NoAnswerError]:
        """Return the answer to each question, or why there is none; several are open at once.

        Where the process is asked to end, what is not answered yet is broken off.
        """
        found: list[str | NoAnswerError] = [SilentError("was not asked to the end")] * len(questions)

        def asked(place: int) -> None:
            try:
                found[place] = self.ask(questions[place])
            except NoAnswerError as error:
                found[place] = error

        def on_answer(_: int) -> None:
            if self.service.should_stop():
                raise _StopError

        try:
            self.service.together(
                [partial(asked, place) for place in range(len(questions))],
                at_once=self.endpoint.at_once, on_answer=on_answer,
            )  # fmt: skip
        except _StopError:
            return found
        return found


class _StopError(Exception):
    """The process was asked to end."""


def key_of_question(question: str) -> str:
    """Return the name of a question in a file of recorded answers: the sha256 of its text."""
    return sha256_json(question)


def recorded_file(place: str) -> Path:
    """Return the path of a file of recorded answers.

    Raises:
        ConfigError: It is not there.
    """
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(f"there are no recorded answers at {place}", next_step="give a file of JSON lines")
    return path


def read_recorded(path: Path) -> dict[str, str]:
    """Read rows `{"key": ..., "answer": ...}`; returns the answers by key.

    Raises:
        DataError: A line is no such row.
    """
    answers: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers[str(row["key"])] = str(row["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}:{number}: no row of the form {{"key": ..., "answer": ...}}',
                next_step="correct the line; key is the sha256 of what was asked about",
            ) from error
    return answers
