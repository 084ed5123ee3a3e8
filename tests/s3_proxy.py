"""A proxy before a real S3 server that does what bad networks and servers do."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from pipeline_lib.storage.s3 import S3Settings


@dataclass(frozen=True)
class Request:
    """What the client sent."""

    number: int
    """Counts from 0."""
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def is_conditional(self) -> bool:
        return any(name.lower() in ("if-match", "if-none-match") for name in self.headers)


@dataclass(frozen=True)
class Answer:
    """What the client gets."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    promised_bytes: int | None = None
    """Content-Length, where it is to differ from the body's."""


Forward = Callable[[Request], Answer]
Fault = Callable[[Request, Forward], Answer]
"""Answers a request, with the server's help or without."""


def refusal(code: str, status: int) -> Answer:
    """Return an error as S3 words it."""
    return Answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def without_conditions(request: Request, forward: Forward) -> Answer:
    """Be a server that does not know conditional writes: what it does not know it ignores."""
    if not request.is_conditional:
        return forward(request)
    kept = {
        name: value for name, value in request.headers.items()
        if name.lower() not in ("if-match", "if-none-match", "authorization", "x-amz-date")
    }  # fmt: skip
    unsigned = AWSRequest(request.method, f"http://{request.headers['Host']}{request.path}", kept, request.body)
    keys = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    S3SigV4Auth(keys, "s3", "us-east-1").add_auth(unsigned)
    return forward(replace(request, headers=dict(unsigned.headers.items())))


@dataclass
class Proxy:
    """A running proxy."""

    settings: S3Settings
    """The store behind the proxy, seen through it."""
    upstream: str
    fault: Fault
    requests: list[Request] = field(default_factory=list)

    def forward(self, request: Request) -> Answer:
        """Ask the real server."""
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            connection.request(request.method, request.path, request.body, request.headers)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()


@contextmanager
def proxied(settings: S3Settings, fault: Fault) -> Iterator[Proxy]:
    """Run a proxy before the server of these settings."""
    assert settings.endpoint_url is not None
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            with lock:
                request = Request(len(proxy.requests), self.command, self.path, headers, body)
                proxy.requests.append(request)
            answer = proxy.fault(request, proxy.forward)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            length = next((v for n, v in answer.headers.items() if n.lower() == "content-length"), "0")
            promised = answer.promised_bytes if answer.promised_bytes is not None else len(answer.body)
            self.send_header("Content-Length", length if is_head else str(promised))
            self.end_headers()
            if not is_head:
                self.wfile.write(answer.body)
            self.close_connection = promised != len(answer.body)

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client did not wait for the answer
                super().handle()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815  (the names that the server looks up)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    upstream = urllib.parse.urlsplit(settings.endpoint_url).netloc
    through = settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{server.server_port}"})
    proxy = Proxy(through, upstream, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
