"""A scorer behind HTTP."""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from pipeline_lib.errors import ConfigError
from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen

MAX_ANSWER_BYTES = 16 << 20
"""Longer answers are refused unread."""
SECRET_PREFIX = "PREFLINE_REWARD_"  # noqa: S105 - the beginning of variables' names, no secret
"""Variables that may be sent: a configuration must not get at the other keys of the environment."""
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


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
        parts = urlsplit(self.url)
        if parts.username or parts.password:
            raise ValueError("url: a password in it would be written into every log; use auth_variable")
        if self.auth_variable and parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
            raise ValueError("url: with auth_variable it must be https, else anyone on the way can read the secret")
        return self

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the scorer's number for each response.

        Raises:
            ConfigError: The variable of `auth_variable` is not set.
        """
        headers = self._headers()
        found: list[float | None] = []
        for start in range(0, len(samples), self.samples_per_request):
            chunk = samples[start : start + self.samples_per_request]
            try:
                scores = self._ask(chunk, headers, resources)
            except _FailedError as failure:
                for sample in chunk:
                    resources.on_problem(sample, str(failure))
                found += [None] * len(chunk)
            else:
                found += [_number(sample, value, resources) for sample, value in zip(chunk, scores, strict=True)]
        return found

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.auth_variable is None:
            return headers
        secret = os.environ.get(self.auth_variable, "").strip()
        if not secret:
            raise ConfigError(
                f"the environment variable {self.auth_variable} of the reward scorer is not set",
                next_step=f"export {self.auth_variable} where training runs",
            )
        return {**headers, self.auth_header: secret}

    def _ask(self, samples: Sequence[Sample], headers: Mapping[str, str], resources: Resources) -> list[Any]:
        """Post samples until there is an answer or there are no more tries."""
        body = json.dumps({"samples": [sample.plain() for sample in samples]}, allow_nan=False).encode()
        pause = threading.Event()  # never set: it is only waited on
        for attempt in range(self.retries + 1):
            try:
                return self._post(body, headers, len(samples))
            except _FailedError as failure:
                if not failure.may_pass or attempt == self.retries or resources.should_stop():
                    raise
            pause.wait(min(60.0, self.backoff_s * 2**attempt))
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes, headers: Mapping[str, str], num_samples: int) -> list[Any]:
        request = urllib.request.Request(self.url, data=body, headers=dict(headers), method="POST")  # noqa: S310 - http(s) by pattern
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.timeout_s) as answer:
                content = answer.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise _FailedError(f"{self._place} answered {error.code} {error.reason}", error.code in _RETRIED) from error
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", None) or error
            raise _FailedError(f"{self._place} cannot be reached: {reason or type(error).__name__}", True) from error
        if len(content) > MAX_ANSWER_BYTES:
            raise _FailedError(f"{self._place} answered more than {MAX_ANSWER_BYTES >> 20} MiB", False)
        return self._scores_in(content, num_samples)

    def _scores_in(self, content: bytes, num_samples: int) -> list[Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise _FailedError(f"{self._place} did not answer with {{'scores': [...]}}", False)
        if len(scores) != num_samples:
            raise _FailedError(f"{self._place} answered {len(scores)} scores for {num_samples} responses", False)
        return scores

    @property
    def _place(self) -> str:
        """The scorer without its query, which may hold a key."""
        return urlsplit(self.url)._replace(query="", fragment="").geturl()


class _FailedError(Exception):
    """A request that brought no scores."""

    def __init__(self, reason: str, may_pass: bool) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses to carry responses, and the secret, to another place."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the redirect is then an error of its status."""


def _number(sample: Sample, value: Any, resources: Resources) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    resources.on_problem(sample, "the scorer has no score" if value is None else f"{str(value)[:80]!r} is no number")
    return None


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
