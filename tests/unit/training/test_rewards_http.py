"""A scorer behind HTTP, against a real server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError
from pipeline_lib.training.rewards import REWARD_SOURCES
from tests.unit.training.reward_samples import Heard, samples, scored
from tests.unit.training.reward_server import Answer, Scorer, scorer, status, text

__all__ = ["scorer"]


def test_samples_go_out_in_chunks_and_scores_come_back(scorer: Scorer) -> None:
    assert scored(scorer.spec(samples_per_request=2), samples("a", "", "abc")) == [1.0, 0.0, 3.0]
    assert [len(body["samples"]) for _, body in scorer.asked] == [2, 1]
    assert scorer.asked[0][1]["samples"][0] == {
        "id": "row0", "prompt": [{"role": "user", "content": "Why?"}], "response": "a", "is_finished": True,
        "tags": [], "reference": "",
    }  # fmt: skip
    assert scored(scorer.spec(), []) == []


def test_a_busy_scorer_is_asked_again(scorer: Scorer) -> None:
    scorer.answers = [status(503), status(429), status(500)]
    assert scored(scorer.spec(retries=3), samples("ab")) == [2.0]
    assert len(scorer.asked) == 4


def test_a_scorer_that_stays_broken_costs_its_chunk_alone(scorer: Scorer) -> None:
    heard = Heard()
    scorer.answers = [status(500), status(500)]
    spec = scorer.spec(retries=1, samples_per_request=1)
    assert scored(spec, samples("ab", "abc"), heard.resources()) == [None, 3.0]
    assert heard.problems == [("row0", f"{scorer.url} did not answer in 2 tries; the last: 500 Internal Server Error")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(401), "answered 401 Unauthorized"),
        (status(404), "answered 404 Not Found"),
        (status(302, Location="http://127.0.0.1:9/"), "answered 302 Found"),
        (status(307, Location="http://127.0.0.1:9/"), "answered 307 Temporary Redirect"),
        (text("<html>"), "answered without {'scores': [...]}"),
        (text("[1]"), "answered without {'scores': [...]}"),
        (text('{"scores": 1}'), "answered without {'scores': [...]}"),
        (text('{"scores": [1, 2]}'), "answered 2 scores for 1 responses"),
    ],
)
def test_what_no_second_try_would_mend_is_not_asked_again(
    scorer: Scorer, answer: Callable[[Any], Answer], reason: str
) -> None:
    heard = Heard()
    scorer.answers = [answer]
    assert scored(scorer.spec(), samples("ab"), heard.resources()) == [None]
    assert heard.problems == [("row0", f"{scorer.url} {reason}")]
    assert len(scorer.asked) == 1


def test_what_is_no_number_is_named_with_its_row(scorer: Scorer) -> None:
    heard = Heard()
    scorer.answers = [text('{"scores": [null, "1", true, NaN, 2]}')]
    assert scored(scorer.spec(), samples(*"abcde"), heard.resources()) == [None, None, None, None, 2.0]
    assert heard.problems == [
        ("row0", "the scorer has no score"), ("row1", "'1' is no number"), ("row2", "'True' is no number"),
        ("row3", "'nan' is no number"),
    ]  # fmt: skip


def test_a_silent_scorer_is_given_up(scorer: Scorer) -> None:
    heard = Heard()
    scorer.answers = [lambda _: None]
    assert scored(scorer.spec(timeout_s=0.2, retries=0), samples("ab"), heard.resources()) == [None]
    assert heard.problems == [("row0", f"{scorer.url} did not answer in 1 try; the last: TimeoutError: timed out")]


def test_a_scorer_that_is_away(scorer: Scorer) -> None:
    heard = Heard()
    spec = {"name": "http", "url": "http://127.0.0.1:1/?key=hidden", "retries": 1, "backoff_s": 0}
    assert scored(spec, samples("ab"), heard.resources()) == [None]
    ((_, reason),) = heard.problems
    assert reason.startswith("http://127.0.0.1:1/ did not answer in 2 tries; the last: ConnectionRefusedError")
    assert "hidden" not in reason


def test_asked_to_end_it_does_not_try_again(scorer: Scorer) -> None:
    scorer.answers = [status(503)]
    heard = Heard()
    resources = heard.resources(should_stop=lambda: True)
    assert scored(scorer.spec(backoff_s=600), samples("ab"), resources) == [None]
    assert len(scorer.asked) == 1


def test_the_secret_comes_out_of_the_environment(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = scorer.spec(auth_variable="PREFLINE_REWARD_TOKEN", auth_header="X-Key")
    monkeypatch.delenv("PREFLINE_REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="PREFLINE_REWARD_TOKEN of the reward scorer is not set"):
        scored(spec, samples("a"))
    assert scorer.asked == []
    monkeypatch.setenv("PREFLINE_REWARD_TOKEN", "open sesame\n")
    scorer.answers = [status(403)]
    heard = Heard()
    assert scored(spec, samples("a"), heard.resources()) == [None]
    assert scorer.asked[0][0]["X-Key"] == "open sesame"
    assert "sesame" not in str(heard.problems)
    assert "sesame" not in REWARD_SOURCES.build(spec).model_dump_json()


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"url": "file:///etc/passwd"}, "url"),
        ({"url": "ftp://scorer/"}, "url"),
        ({"url": "https://me:secret@scorer/"}, "use auth_variable"),
        ({"url": "http://scorer/", "auth_variable": "PREFLINE_REWARD_TOKEN"}, "must be https"),
        ({"url": "https://scorer/", "auth_variable": "AWS_SECRET_ACCESS_KEY"}, "auth_variable"),
    ],
)
def test_what_would_leak_is_refused(parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        REWARD_SOURCES.build({"name": "http", **parameters})
