"""JSON over HTTP for requests that take minutes: tries again, and can be broken off from another thread."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline_lib.errors import ConfigError, GeneratorError

if TYPE_CHECKING:
    from pipeline_lib.generation.vllm import Vllm

MAX_ANSWER_BYTES = 64 << 20
"""Longer answers are refused unread."""
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHOWN_CHARACTERS = 300
_LONGEST_WAIT_S = 60.0


class RefusedError(Exception):
    """The server answered that it will not, and why."""


@dataclass
class HttpJson:
    """A server. Redirects are not followed: they would carry prompts, and the key, to another place."""

    place: str
    headers: Mapping[str, str]
    timeout_s: float
    retries: int
    backoff_s: float
    _open: set[http.client.HTTPConnection] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hung_up: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, settings: Vllm) -> HttpJson:
        """Take a server's address and manners.

        Raises:
            ConfigError: The variable of `auth_variable` is not set.
        """
        assert settings.url is not None
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if settings.auth_variable is not None:
            secret = os.environ.get(settings.auth_variable, "").strip()
            if not secret:
                raise ConfigError(
                    f"the environment variable {settings.auth_variable} of the generator is not set",
                    next_step=f"export {settings.auth_variable} where training runs",
                )
            headers["Authorization"] = f"Bearer {secret}"
        return cls(settings.url, headers, settings.timeout_s, settings.retries, settings.backoff_s)

    def get(self, path: str) -> bytes:
        """Return the answer to a GET; see `post`."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Return the answer to a POST of JSON.

        Raises:
            RefusedError: The server said no.
            GeneratorError: It did not answer in any of the tries, or the line was hung up.
        """
        return self._ask("POST", path, json.dumps(body, allow_nan=False).encode())

    def hang_up(self) -> None:
        """Break all requests off, those that wait to be tried again too."""
        self._hung_up.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    try:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        continue  # the other side was faster

    def pick_up(self) -> None:
        """Take requests again."""
        self._hung_up.clear()

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        failure = "it was not asked"
        for attempt in range(self.retries + 1):
            if self._hung_up.is_set():
                break
            try:
                status, reason, content = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
                failure = f"{type(error).__name__}: {error}".removesuffix(": ")
            else:
                if len(content) > MAX_ANSWER_BYTES:
                    raise RefusedError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
                if status == http.client.OK:
                    return content
                failure = f"{status} {reason}: {_message(content)}"
                if status not in _RETRIED:
                    raise RefusedError(failure)
            if attempt < self.retries:
                self._hung_up.wait(min(_LONGEST_WAIT_S, self.backoff_s * 2**attempt))
        raise GeneratorError(
            f"{self.place}{path} did not answer in {self.retries + 1} tries; the last: {failure}",
            next_step="start the server, or check generator.url, generator.timeout_s and generator.retries",
        )

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        parts = urlsplit(self.place)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            if self._hung_up.is_set():
                raise ConnectionAbortedError("hung up")
            connection.request(method, path, body=body, headers=dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.reason, answer.read(MAX_ANSWER_BYTES + 1)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def _message(content: bytes) -> str:
    """Return what a server says of its refusal, shortened: vLLM's own word where there is one."""
    text = content[: 64 * 1024].decode("utf-8", errors="replace").strip()
    try:
        answer = json.loads(text)
        said = answer["error"]["message"] if isinstance(answer.get("error"), dict) else answer["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        said = text
    return str(said)[:_SHOWN_CHARACTERS]
