"""A scorer behind HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline_lib.http_json import HttpJson, NoAnswerError, RefusedError, check_url, json_headers
from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen

MAX_ANSWER_BYTES = 16 << 20
"""Longer answers are refused unread."""
SECRET_PREFIX = "PREFLINE_REWARD_"  # noqa: S105 - the beginning of variables' names, no secret
"""Variables that may be sent: a configuration must not get at the other keys of the environment."""


class Http(Frozen):
    """What a scorer answers to a POST of `{"samples": [{id, prompt, response, ...}]}`: `{"scores": [...]}`.

    A score is a number, or null where the scorer has none. Redirects are not followed.
    """

    url: str = Field(pattern=r"^https?://[^\s/]+")
    """Where to post."""
    version: str = ""
    """Which version of the scorer this is: another word is another result, so stages run again."""
    samples_per_request: int = Field(16, ge=1)
    """Responses of one request, at most."""
    timeout_s: float = Field(30.0, gt=0, le=3600)
    """Seconds without a word from the scorer after which a request has failed."""
    retries: int = Field(4, ge=0, le=20)
    """Tries after the first, where the scorer is busy, broken or away."""
    backoff_s: float = Field(1.0, ge=0, le=600)
    """Wait before the second try; it doubles with every further one, up to a minute."""
    auth_variable: str | None = Field(None, pattern=f"^{SECRET_PREFIX}[A-Z0-9_]+$")
    """Environment variable that holds the value of the `auth_header`, e.g. `PREFLINE_REWARD_TOKEN`."""
    auth_header: str = Field("Authorization", pattern=r"^[A-Za-z0-9-]+$")
    """The header that carries it."""

    @model_validator(mode="after")
    def _keeps_its_secret(self) -> Self:
        check_url(self.url, auth_variable=self.auth_variable)
        return self

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the scorer's number for each response.

        Raises:
            ConfigError: The variable of `auth_variable` is not set.
        """
        headers = json_headers(self.auth_variable, whose="reward scorer", header=self.auth_header)
        service = HttpJson(
            self.url, headers, self.timeout_s, self.retries, self.backoff_s, should_stop=resources.should_stop,
            max_answer_bytes=MAX_ANSWER_BYTES,
        )  # fmt: skip
        found: list[float | None] = []
        for start in range(0, len(samples), self.samples_per_request):
            chunk = samples[start : start + self.samples_per_request]
            try:
                scores = _scores_of(chunk, service)
            except NoAnswerError as failure:
                verb = " answered" if isinstance(failure, RefusedError) else ""
                for sample in chunk:
                    resources.on_problem(sample, f"{service.shown}{verb} {failure}")
                found += [None] * len(chunk)
            else:
                found += [_number(sample, value, resources) for sample, value in zip(chunk, scores, strict=True)]
        return found


def _scores_of(samples: Sequence[Sample], service: HttpJson) -> list[Any]:
    """Ask for the scores of some samples; one a sample, whatever they are."""
    content = service.post({"samples": [sample.plain() for sample in samples]})
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise RefusedError("without {'scores': [...]}")
    if len(scores) != len(samples):
        raise RefusedError(f"{len(scores)} scores for {len(samples)} responses")
    return scores


def _number(sample: Sample, value: Any, resources: Resources) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    resources.on_problem(sample, "the scorer has no score" if value is None else f"{str(value)[:80]!r} is no number")
    return None
