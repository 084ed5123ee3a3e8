"""A service behind HTTP for the tests of reward sources and judges."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Scorer:
    """A server whose next answers are set beforehand, and which keeps what it was asked."""

    url: str = ""
    otherwise: Callable[[Any], Answer | None] | None = None
    """Answers where no answer is set; None: the responses' lengths as scores."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: list[Callable[[Any], Answer | None]] = field(default_factory=list)
    asked: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def spec(self, **parameters: Any) -> dict[str, Any]:
        return {"name": "http", "url": self.url, "backoff_s": 0, **parameters}


def lengths(body: Any) -> Answer:
    return 200, {}, json.dumps({"scores": [len(row["response"]) for row in body["samples"]]}).encode()


def status(code: int, **headers: str) -> Callable[[Any], Answer]:
    return lambda _: (code, headers, b"")


def text(content: str) -> Callable[[Any], Answer]:
    return lambda _: (200, {}, content.encode())


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    """A running scorer that answers with the responses' lengths unless told otherwise."""
    served = Scorer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.asked.append((dict(self.headers), body))
                answering = served.answers.pop(0) if served.answers else served.otherwise or lengths
            answer = answering(body)
            if answer is None:  # says nothing until the test is over
                served.released.wait()
                return
            code, headers, content = answer
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/score"
    yield served
    served.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
