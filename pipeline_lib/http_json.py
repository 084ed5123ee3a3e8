"""JSON over HTTP to a service that may be busy, slow or away: scorers, generators and judges.

A request is tried again where another try may help, its answer is bounded, and it can be broken off
from another thread. Redirects are not followed: they would carry texts, and the key, to another place.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import socket
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from pipeline_lib.errors import ConfigError

AnswerT = TypeVar("AnswerT")

MAX_ANSWER_BYTES = 64 << 20
"""Longer answers are refused unread."""
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHOWN_CHARACTERS = 300
_LONGEST_WAIT_S = 60.0
_LOOK_EVERY_S = 2.0
"""How long a request to stop waits to be noticed where no answer comes."""


class NoAnswerError(Exception):
    """A request that brought nothing; its text goes on after the name of the place."""


class RefusedError(NoAnswerError):
    """The service answered that it will not, and why: another try would not help."""


class SilentError(NoAnswerError):
    """The service did not answer in any of the tries, or the requests were broken off."""


def check_url(url: str, *, auth_variable: str | None) -> None:
    """Refuse a place that would give a secret away.

    Raises:
        ValueError: A password stands in it, or a secret would go over the net in the clear.
    """
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError("url: a password in it would be written into every log; use auth_variable")
    if auth_variable and parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
        raise ValueError("url: with auth_variable it must be https, else anyone on the way can read the secret")


def json_headers(
    auth_variable: str | None, *, whose: str, header: str = "Authorization", prefix: str = ""
) -> dict[str, str]:
    """Return the headers of a request for JSON, with the secret of an environment variable where one is named.

    Args:
        auth_variable: The variable that holds the secret; None for none.
        whose: What asks for it, for the message.
        header: The header that carries it.
        prefix: What stands before it, e.g. `Bearer `.

    Raises:
        ConfigError: The variable is not set.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if auth_variable is None:
        return headers
    secret = os.environ.get(auth_variable, "").strip()
    if not secret:
        raise ConfigError(
            f"the environment variable {auth_variable} of the {whose} is not set",
            next_step=f"export {auth_variable} where the run takes place",
        )
    return {**headers, header: prefix + secret}


@dataclass
class HttpJson:
    """A service at one place."""

    place: str
    """`http(s)://host:port`, with a path and a query where all requests share them."""
    headers: Mapping[str, str]
    timeout_s: float
    """Seconds without a word after which a request has failed."""
    retries: int
    backoff_s: float
    should_stop: Callable[[], bool] = lambda: False
    """Asked before a request is tried again."""
    max_answer_bytes: int = MAX_ANSWER_BYTES
    _open: set[http.client.HTTPConnection] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def shown(self) -> str:
        """The place without its query, which may hold a key."""
        return urlsplit(self.place)._replace(query="", fragment="").geturl()

    def get(self, path: str = "") -> bytes:
        """Return the answer to a GET; see `post`."""
        return self._ask("GET", path, None)

    def post(self, body: Mapping[str, Any], path: str = "") -> bytes:
        """Return the answer to a POST of JSON.

        Args:
            body: What is sent.
            path: Comes after the place's own path.

        Raises:
            RefusedError: The service said no.
            SilentError: It did not answer in any of the tries, or the line was hung up.
        """
        return self._ask("POST", path, json.dumps(body, allow_nan=False).encode())

    def together(
        self, requests: Sequence[Callable[[], AnswerT]], *, at_once: int, on_answer: Callable[[int], None]
    ) -> list[AnswerT]:
        """Run requests of this service in threads and return their answers in order.

        The first failure breaks the others off, and so does whatever `on_answer` raises: whoever gave up
        does not wait for what is still being written.

        Args:
            requests: Each makes one request.
            at_once: How many are open at once.
            on_answer: Told how many are done, and called now and then where none is.
        """
        if not requests:
            return []
        pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="http")
        is_complete = False
        try:
            asked = [pool.submit(request) for request in requests]
            _await(asked, on_answer)
            is_complete = True
            return [future.result() for future in asked]
        finally:
            if not is_complete:
                self.hang_up()
            pool.shutdown(wait=True, cancel_futures=True)
            self.pick_up()

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
        failure, tries = "it was not asked", 0
        for attempt in range(self.retries + 1):
            if self._hung_up.is_set():
                break
            tries += 1
            try:
                status, reason, content = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:  # timeouts are OSErrors
                failure = f"{type(error).__name__}: {error}".removesuffix(": ")
            else:
                if len(content) > self.max_answer_bytes:
                    raise RefusedError(f"more than {self.max_answer_bytes >> 20} MiB")
                if status == http.client.OK:
                    return content
                said = _message(content)
                failure = f"{status} {reason}" + (f": {said}" if said else "")
                if status not in _RETRIED:
                    raise RefusedError(failure)
            if attempt < self.retries:
                if self.should_stop():
                    break
                self._hung_up.wait(min(_LONGEST_WAIT_S, self.backoff_s * 2**attempt))
        raise SilentError(f"did not answer in {tries} {'try' if tries == 1 else 'tries'}; the last: {failure}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        parts = urlsplit(self.place)
        query = f"?{parts.query}" if parts.query else ""
        target = f"{(parts.path + path) or '/'}{query}"
        connection, target, headers = _connection(parts, target, self.headers, self.timeout_s)
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            if self._hung_up.is_set():
                raise ConnectionAbortedError("hung up")
            connection.request(method, target, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.reason, answer.read(self.max_answer_bytes + 1)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def _await(asked: Sequence[Future[Any]], on_answer: Callable[[int], None]) -> None:
    left = set(asked)
    while left:
        done, left = wait(left, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        on_answer(len(asked) - len(left))


def _connection(
    parts: SplitResult, target: str, headers: Mapping[str, str], timeout_s: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """Return a connection that is not open yet, through the environment's proxy where it names one."""
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host = parts.hostname or ""
    proxy = None
    if not _is_this_machine(host) and not urllib.request.proxy_bypass(host):
        proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is None:
        return kind(host, parts.port, timeout=timeout_s), target, dict(headers)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    own = _proxy_headers(through)
    connection = kind(through.hostname or "", through.port, timeout=timeout_s)
    if parts.scheme == "https":
        connection.set_tunnel(host, parts.port, headers=own)
        return connection, target, dict(headers)
    return connection, f"http://{parts.netloc}{target}", {**headers, **own}


def _proxy_headers(through: SplitResult) -> dict[str, str]:
    if not through.username:
        return {}
    pair = f"{unquote(through.username)}:{unquote(through.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def _message(content: bytes) -> str:
    """Return what a service says of its refusal, shortened: its own word in the form of OpenAI's where there is one."""
    text = content[: 64 * 1024].decode("utf-8", errors="replace").strip()
    try:
        answer = json.loads(text)
        said = answer["error"]["message"] if isinstance(answer.get("error"), dict) else answer["message"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        said = text
    return str(said)[:_SHOWN_CHARACTERS]


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
