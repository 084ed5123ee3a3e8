"""Rules on a response's text: what each earns, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline_lib.errors import ConfigError
from tests.unit.training.reward_samples import Heard, sample, samples, scored


@pytest.mark.parametrize(
    ("words", "tolerance", "earned"),
    [(4, 0, 1.0), (3, 0, 0.75), (5, 0, 0.75), (3, 1, 1.0), (2, 1, 0.75), (0, 0, 0.0), (8, 0, 0.0), (99, 0, 0.0)],
)
def test_each_word_off_the_target_costs_its_share(words: int, tolerance: int, earned: float) -> None:
    spec = {"name": "length", "target": 4, "tolerance": tolerance}
    assert scored(spec, [sample(" ".join(["word"] * words))]) == [earned]


@pytest.mark.parametrize(("unit", "target"), [("tokens", 7), ("characters", 5), ("words", 1)])
def test_length_is_counted_in_its_unit(unit: str, target: int) -> None:
    # "äöabc" is 5 characters and, a byte a token, 7 tokens; the end-of-turn token is none of them.
    assert scored({"name": "length", "target": target, "unit": unit}, [sample("äöabc")]) == [1.0]
    assert scored({"name": "length", "target": 7, "unit": "tokens"}, [sample("äöabc", is_finished=False)]) == [1.0]


@pytest.mark.parametrize(
    ("response", "earned"),
    [
        ("Cats like dogs", 2 / 3),
        ("cats, dogs; the New  York", 2 / 3),
        ("CATS and dogs in new york.", 1.0),
        ("catsup for underdogs", 0.0),
        ("", 0.0),
        ("cats cats cats", 1 / 3),
    ],
)
def test_whole_words_count_once_and_case_aside(response: str, earned: float) -> None:
    assert scored({"name": "words", "words": ["cats", "dogs", "New York"]}, [sample(response)]) == [earned]


def test_words_may_begin_and_end_with_signs() -> None:
    assert scored({"name": "words", "words": ["C++", "$5"]}, samples("C++ costs $5.", "C+ costs 5")) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("response", "is_finished", "only_finished", "earned"),
    [("Yes.", True, False, 1.0), ("Yes. \n", True, False, 1.0), ("Yes", True, False, 0.0), ("", True, False, 0.0),
     ("Yes.", False, False, 1.0), ("Yes.", False, True, 0.0), ("Yes.", True, True, 1.0)],
)  # fmt: skip
def test_ends_with(response: str, is_finished: bool, only_finished: bool, earned: float) -> None:
    spec = {"name": "ends_with", "endings": [".", "?"], "only_finished": only_finished}
    assert scored(spec, [sample(response, is_finished=is_finished)]) == [earned]


@pytest.mark.parametrize(
    ("parameters", "response", "earned"),
    [
        ({"form": "json"}, ' {"a": [1, null]} ', 1.0),
        ({"form": "json"}, "3", 1.0),
        ({"form": "json"}, '{"a": NaN}', 0.0),
        ({"form": "json"}, '{"a": 1} so', 0.0),
        ({"form": "json"}, "", 0.0),
        ({"form": "json"}, "[" * 100_000, 0.0),
        ({"form": "json"}, '```json\n{"a": 1}\n```', 0.0),
        ({"form": "json", "fenced": True}, '```json\n{"a": 1}\n```', 1.0),
        ({"form": "json_object"}, "[1]", 0.0),
        ({"form": "json_object"}, "{}", 1.0),
        ({"form": "json_object", "keys": ["a", "b"]}, '{"a": 1, "b": 2, "c": 3}', 1.0),
        ({"form": "json_object", "keys": ["a", "b"]}, '{"a": 1}', 0.0),
        ({"form": "bullets"}, "- one\n\n * two\n3. three\n4) four", 1.0),
        ({"form": "bullets"}, "- one\ntwo", 0.0),
        ({"form": "bullets"}, "-one", 0.0),
        ({"form": "bullets"}, "", 0.0),
    ],
)
def test_format(parameters: dict[str, Any], response: str, earned: float) -> None:
    assert scored({"name": "format", **parameters}, [sample(response)]) == [earned]


@pytest.mark.parametrize(
    ("extract", "reference", "response", "earned"),
    [
        ("number", "He pays 2 * 3 = 6.\n#### 6", "So it is 6.", 1.0),
        ("number", "#### 1,200", "They cost $1200.00 in all", 1.0),
        ("number", "#### 6", "6 or 7", 0.0),
        ("number", "#### 6", "first 7\n#### 6\nor 9", 1.0),
        ("number", "#### -5", "x = -5", 1.0),
        ("number", "#### 5", "12-5", 1.0),  # a subtraction's 5 is not -5
        ("number", "#### 0.5", "It is .5", 1.0),
        ("number", "42", "The answer is 042.", 1.0),
        ("number", "#### 12345678901234567890123456789012", "12345678901234567890123456789013", 0.0),
        ("number", "#### 6", "six", 0.0),
        ("number", "#### 0", "-0.0", 1.0),
        ("hashes", "#### 6", "So it is 6.", 0.0),
        ("hashes", "#### 6", "#### 6", 1.0),
        ("hashes", "#### 6", "#### 5\n#### 6", 1.0),
        ("number", "#### Yes", "#### yes.", 1.0),
        ("whole", "Paris", " paris. ", 1.0),
        ("whole", "New York", "new\n york", 1.0),
        ("whole", "Paris", "It is Paris", 0.0),
    ],
)
def test_exact_answer(extract: str, reference: str, response: str, earned: float) -> None:
    assert scored({"name": "exact_answer", "extract": extract}, [sample(response, reference=reference)]) == [earned]


def test_a_row_without_an_answer_is_not_scored() -> None:
    heard = Heard()
    spec = {"name": "exact_answer", "right": 2, "wrong": -1}
    rows = [sample("6"), sample("6", name="other", reference="6"), sample("7", name="third", reference="6")]
    assert scored(spec, rows, heard.resources()) == [None, 2.0, -1.0]
    assert heard.problems == [("row", "its row has no answer to compare with (number)")]


def test_regex() -> None:
    rows = samples("the Answer: 12", "answer 12", "")
    spec = {"name": "regex", "pattern": r"(?i)answer: \d+", "found": 2, "absent": -1}
    assert scored(spec, rows) == [2.0, -1.0, -1.0]
    assert scored({"name": "regex", "pattern": r"answer \d+", "whole": True}, rows) == [0.0, 1.0, 0.0]


def test_a_regex_that_never_ends_costs_its_row_alone() -> None:
    # Exponential backtracking that holds the interpreter: no thread of the same process could stop it.
    heard = Heard()
    rows = samples("aaa", "a" * 60 + "b", "b")
    spec = {"name": "regex", "pattern": "^(a+)+$", "timeout_s": 0.5}
    assert scored(spec, rows, heard.resources()) == [1.0, None, 0.0]
    ((row, reason),) = heard.problems
    assert row == "row1"
    assert reason.startswith("hung for 0.5 s at worker.py:")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"name": "regex", "pattern": "(a"}, "no regular expression"),
        ({"name": "length"}, "target"),
        ({"name": "words", "words": [" "]}, "words"),
        ({"name": "format", "keys": ["a"]}, "json_object"),
        ({"name": "lenght", "target": 1}, "did you mean 'length'"),
        ({"name": "length", "target": 1, "tolerence": 2}, "did you mean 'tolerance'"),
    ],
)
def test_bad_parameters_are_refused(spec: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint.replace("(", r"\(")):
        scored(spec, [])
