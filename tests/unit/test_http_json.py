"""The one client of HTTP services, against a real server."""

from __future__ import annotations

import json
import threading
from functools import partial
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError
from pipeline_lib.http_json import HttpJson, RefusedError, SilentError, check_url, json_headers
from tests.unit.training.reward_server import Scorer, scorer, status, text

__all__ = ["scorer"]


def client(place: str, **how: Any) -> HttpJson:
    given: dict[str, Any] = {"timeout_s": 10.0, "retries": 2, "backoff_s": 0.0, **how}
    return HttpJson(place, json_headers(None, whose="test"), **given)


def echo(body: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(body).encode()


def test_busy_is_asked_again_and_a_refusal_is_not(scorer: Scorer) -> None:
    scorer.otherwise = echo
    scorer.answers = [status(503), status(429)]
    assert json.loads(client(scorer.url).post({"a": 1})) == {"a": 1}
    assert len(scorer.asked) == 3
    scorer.answers = [lambda _: (400, {}, b'{"error": {"message": "too long"}}')]
    with pytest.raises(RefusedError, match=r"^400 Bad Request: too long$"):
        client(scorer.url).post({})
    assert len(scorer.asked) == 4


def test_the_last_failure_is_told(scorer: Scorer) -> None:
    scorer.answers = [status(500), lambda _: (503, {}, b"come back later")]
    with pytest.raises(SilentError, match=r"^did not answer in 2 tries; the last: 503 Service Unavailable: come back"):
        client(scorer.url, retries=1).post({})


def test_whoever_is_asked_to_end_does_not_try_again(scorer: Scorer) -> None:
    scorer.answers = [status(503)]
    with pytest.raises(SilentError, match=r"^did not answer in 1 try; the last: 503"):
        client(scorer.url, backoff_s=600.0, should_stop=lambda: True).post({})


def test_an_answer_is_read_up_to_its_limit_alone(scorer: Scorer) -> None:
    scorer.otherwise = text("x" * (2 << 20))
    with pytest.raises(RefusedError, match=r"^more than 1 MiB$"):
        client(scorer.url, max_answer_bytes=1 << 20).post({})


def test_a_query_is_sent_and_never_shown(scorer: Scorer) -> None:
    service = client(scorer.url + "?key=hidden")
    assert service.shown == scorer.url
    scorer.otherwise = echo
    assert json.loads(service.post({}, "/more")) == {}


def test_requests_go_out_together_and_their_answers_come_in_order(scorer: Scorer) -> None:
    barrier = threading.Barrier(3)

    def together(body: Any) -> tuple[int, dict[str, str], bytes]:
        barrier.wait(timeout=30)  # passes only where three are open at once
        return echo(body)

    scorer.otherwise = together
    service, told = client(scorer.url), list[int]()
    requests = [partial(service.post, {"n": n}) for n in range(6)]
    answers = service.together(requests, at_once=3, on_answer=told.append)
    assert [json.loads(answer)["n"] for answer in answers] == list(range(6))
    assert told[-1] == 6
    assert service.together([], at_once=3, on_answer=told.append) == []


def test_the_first_failure_breaks_the_others_off(scorer: Scorer) -> None:
    scorer.otherwise = lambda _: None  # says nothing until the test is over
    scorer.answers = [status(403)]
    service = client(scorer.url, timeout_s=3600.0)
    with pytest.raises(RefusedError, match="403"):
        service.together([partial(service.post, {})] * 3, at_once=3, on_answer=lambda _: None)
    scorer.otherwise = echo
    assert service.post({"again": 1}) == b'{"again": 1}', "the line should be open again"


def test_the_environments_proxy_is_used_but_not_for_this_machine(
    scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer.otherwise = echo
    proxy = scorer.url.removesuffix("/score").replace("http://", "http://me:pass@")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    assert client("http://far.example/v1?x=1").post({"n": 1}) == b'{"n": 1}'
    headers, _ = scorer.asked[0]
    assert (headers["Host"], headers["Proxy-Authorization"]) == ("far.example", "Basic bWU6cGFzcw==")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert client(scorer.url).post({"n": 2}) == b'{"n": 2}'


def test_a_secret_comes_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFLINE_JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="PREFLINE_JUDGE_KEY of the judge is not set"):
        json_headers("PREFLINE_JUDGE_KEY", whose="judge")
    monkeypatch.setenv("PREFLINE_JUDGE_KEY", "open sesame\n")
    assert json_headers("PREFLINE_JUDGE_KEY", whose="judge", prefix="Bearer ")["Authorization"] == "Bearer open sesame"


@pytest.mark.parametrize(
    ("url", "variable", "complaint"),
    [
        ("https://me:secret@far.example/", None, "use auth_variable"),
        ("http://far.example/", "PREFLINE_JUDGE_KEY", "must be https"),
    ],
)
def test_what_would_leak_is_refused(url: str, variable: str | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_url(url, auth_variable=variable)
    check_url("http://127.0.0.1:1/", auth_variable="PREFLINE_JUDGE_KEY")
