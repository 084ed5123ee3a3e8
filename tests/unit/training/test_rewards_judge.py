"""A judge: what it is asked, and what of its answer is a grade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.schema import Message
from pipeline_lib.training.rewards import REWARD_SOURCES
from pipeline_lib.training.rewards.contract import Resources
from pipeline_lib.training.rewards.judge import Judge, key_of
from tests.unit.training.judge_server import endpoint, saying
from tests.unit.training.reward_samples import Heard, sample, samples, scored
from tests.unit.training.reward_server import Scorer, scorer, status

__all__ = ["scorer"]


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("It is right. Rating: [[10]]", 1.0),
        ("Rating: [[1]]", 0.0),
        ("Rating: [[5.5]]", 0.5),
        ("Rating: [[4]], not [[9]]", 1 / 3),
        ("See [2]. Rating: [[7]]", 2 / 3),
        ("Rating: [7]", 2 / 3),
    ],
)
def test_a_grade_is_scaled_to_0_and_1(answer: str, grade: float) -> None:
    resources = Resources(answers_of=lambda questions, *, max_new_tokens: [answer] * len(questions))
    assert scored({"name": "judge", "model": "reference"}, samples("a", "b"), resources) == [grade, grade]


@pytest.mark.parametrize("answer", ["", "Rating: 7", "Rating: [[11]]", "Rating: [[0]]", "[[-3]]", "[[]]", "[[nan]]"])
def test_an_answer_without_a_grade_is_none(answer: str) -> None:
    heard = Heard()
    resources = heard.resources(answers_of=lambda questions, *, max_new_tokens: [answer])
    assert scored({"name": "judge", "model": "reference"}, [sample("a")], resources) == [None]
    assert heard.problems == [("row", f"the judge gave no grade of 1 to 10: {answer!r}")]


def test_it_is_asked_about_the_conversation_and_the_response() -> None:
    asked: list[str] = []

    def answers_of(questions: Any, *, max_new_tokens: int) -> list[str]:
        asked.extend(questions)
        assert max_new_tokens == 9
        return ["[[0]]"]

    spec = {
        "name": "judge", "model": "reference", "low": -2, "high": 2, "max_new_tokens": 9,
        "question": "{conversation} | {response} | {low} {middle} {high} | {other}",
    }  # fmt: skip
    # Braces in the texts are no places to fill.
    assert scored(spec, [sample("So {low}.", prompt="Why {response}?")], Resources(answers_of=answers_of)) == [0.5]
    assert asked == ["User: Why {response}? | So {low}. | -2 0 2 | {other}"]


def test_the_question_names_the_form_that_is_read() -> None:
    judge = Judge(model="reference")
    one = sample("Because.", prompt="Why?")
    question = judge.text_for(one)
    assert "User: Why?" in question
    assert "Because." in question
    assert '"Rating: [[5]]"' in question
    assert "{" not in question


def test_recorded_answers(tmp_path: Path) -> None:
    rows = [sample("a"), sample("b", name="other"), sample("c", name="third")]
    path = tmp_path / "answers.jsonl"
    lines = [{"key": key_of(rows[0]), "answer": "[[10]]\u2028"}, {"key": key_of(rows[2]), "answer": "[[1]]"}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    heard = Heard()
    spec = {"name": "judge", "recorded": str(path)}
    assert scored(spec, rows, heard.resources()) == [1.0, None, 0.0]
    assert heard.problems == [("other", f"the recorded answers have none for {key_of(rows[1])[:12]}")]
    fingerprint = REWARD_SOURCES.build(spec).fingerprints()
    path.write_text(path.read_text() + "\n")
    assert REWARD_SOURCES.build(spec).fingerprints() != fingerprint
    assert list(fingerprint) == [str(path)]


def test_the_key_is_of_the_texts_alone() -> None:
    # From sha256sum over [[["user","Why?"]],"a"].
    key = "80675f53b41f9f3d67ebbf7eff9adbf379f6bfdda8f720ba732b404bf6ce2b65"
    assert key_of(sample("a")) == key
    assert key_of(sample("a", name="x", tags=("safe",), is_finished=False)) == key
    assert key_of(sample("a")) != key_of(sample("a", prompt="How?"))


def test_recorded_answers_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with pytest.raises(ConfigError, match="no recorded answers at"):
        scored({"name": "judge", "recorded": str(path)}, [sample("a")])
    path.write_text('{"key": "a", "answer": "[[1]]"}\n{"key": "a"}\n')
    with pytest.raises(DataError, match=r"answers.jsonl:2: no row of the form"):
        scored({"name": "judge", "recorded": str(path)}, [sample("a")])


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({}, "give one of model, endpoint and recorded"),
        ({"model": "reference", "recorded": "x"}, "give one of model, endpoint and recorded"),
        ({"model": "reference", "endpoint": {"url": "http://x", "model": "m"}}, "give one of model, endpoint and"),
        ({"model": "reference", "low": 3, "high": 3}, "must be below"),
        ({"model": "reference", "question": "Good?"}, "never sees"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        REWARD_SOURCES.build({"name": "judge", **parameters})


def test_a_service_grades_several_at_once(scorer: Scorer) -> None:
    scorer.otherwise = saying(lambda _: "Fine. [[10]]")
    assert scored({"name": "judge", "endpoint": endpoint(scorer)}, samples("a", "b", "c")) == [1.0, 1.0, 1.0]
    assert all("[The assistant's answer]" in body["messages"][0]["content"] for _, body in scorer.asked)
    heard = Heard()
    scorer.answers = [status(400), saying(lambda _: "Well.")]
    spec = {"name": "judge", "endpoint": endpoint(scorer, at_once=1)}
    assert scored(spec, samples("a", "b", "c"), heard.resources()) == [None, None, 1.0]
    assert heard.problems == [
        ("row0", f"{scorer.url} answered 400 Bad Request"), ("row1", "the judge gave no grade of 1 to 10: 'Well.'"),
    ]  # fmt: skip


def test_asked_to_end_it_does_not_wait_for_answers(scorer: Scorer) -> None:
    scorer.answers = [saying(lambda _: "[[10]]"), lambda _: None]
    spec = {"name": "judge", "endpoint": endpoint(scorer, at_once=1, timeout_s=3600)}
    resources = Heard().resources(should_stop=lambda: True)
    assert scored(spec, samples("a", "b", "c"), resources) == [1.0, None, None]


def test_a_stage_without_a_model_to_judge_says_so() -> None:
    with pytest.raises(ConfigError, match="no model to judge with"):
        scored({"name": "judge", "model": "reference"}, [sample("a")])


def test_turns_are_told_apart() -> None:
    one = sample("Fine.")
    turns = (
        Message(role="system", content="Be kind."), Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello"), Message(role="user", content="Well?"),
    )  # fmt: skip
    judge = Judge(model="reference", question="{conversation}\n\nAnswer: {response}")
    asked = judge.text_for(type(one)(one.record_id, turns, one.response, one.tree, one.is_finished))
    assert asked == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Well?\n\nAnswer: Fine."
