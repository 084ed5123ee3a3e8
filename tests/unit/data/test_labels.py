"""Scores, strength, weight and tags of rows; the score of upvotes against the formula by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline_lib.data.labels import stack_exchange_score, strength_in_words
from pipeline_lib.data.mapping import FieldMapping, map_rows
from pipeline_lib.data.read import RawRow
from pipeline_lib.schema import Message, Origin, Record, Rejection, Response

ORIGIN = Origin(source="s", place="f")
PROMPT = (Message(role="user", content="p"),)
PAIR = (Response(content="a"), Response(content="b"))
SINGLE = {"prompt": "p", "response": "r"}
COMPARISON = {"prompt": "p", "chosen": "a", "rejected": "b"}


def map_one(values: dict[str, Any], **mapping: Any) -> Record | Rejection:
    (found,) = map_rows([RawRow(values, 1, 0)], FieldMapping(**mapping), origin=lambda: ORIGIN, note=lambda _: None)
    return found


def only(values: dict[str, Any], **mapping: Any) -> Record:
    found = map_one(values, **mapping)
    assert isinstance(found, Record), found
    return found


def scores(record: Record) -> list[float | None]:
    return [response.score for response in record.responses]


def test_ids_of_rows_without_labels_are_those_they_always_had() -> None:
    """Computed before rows had labels, so that stored artifacts and caches stay valid."""
    known = {
        "90457932": Record.create(PROMPT, origin=ORIGIN),
        "49f3437a": Record.create(PROMPT, PAIR[:1], origin=ORIGIN),
        "873a3cd3": Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN),
    }
    assert {key: record.id[:8] for key, record in known.items()} == {key: key for key in known}


def test_labels_are_part_of_the_id_and_tags_are_not() -> None:
    plain = Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN)
    scored = (Response(content="a", score=3.0), Response(content="b"))
    others = [
        Record.create(PROMPT, scored, (1, 2), origin=ORIGIN),
        Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN, strength="slightly"),
        Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN, weight=0.5),
    ]
    assert len({plain.id, *(record.id for record in others)}) == 4
    assert Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN, tags=("safe",)).id == plain.id
    assert Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN, weight=1.0).id == plain.id


@pytest.mark.parametrize("row", [
    {"strength": "hugely"}, {"weight": 0.0}, {"weight": -1.0},
])  # fmt: skip
def test_the_schema_refuses_what_means_nothing(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(row))):
        Record.create(PROMPT, PAIR, (1, 2), origin=ORIGIN, **row)


def test_a_strength_needs_a_comparison() -> None:
    with pytest.raises(ValueError, match="two or more responses"):
        Record.create(PROMPT, PAIR[:1], origin=ORIGIN, strength="better")


@pytest.mark.parametrize(
    ("upvotes", "is_accepted", "expected"),
    # log2(1 + upvotes): 0 -> 0, 1 -> 1, 2 -> 1.58, 3 -> 2, 5 -> 2.58, 6 -> 2.81, 7 -> 3, 100 -> 6.66
    [(0, False, 0), (1, False, 1), (2, False, 2), (3, False, 2), (5, False, 3), (6, False, 3), (7, False, 3),
     (100, False, 7), (0, True, 1), (7, True, 4), (-1, False, -1), (-12, True, -1)],
)  # fmt: skip
def test_the_score_of_upvotes(upvotes: int, is_accepted: bool, expected: int) -> None:
    assert stack_exchange_score(upvotes, is_accepted=is_accepted) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [("significantly better", "significantly"), ("Much better", "significantly"), ("better", "better"),
     ("a-is-slightly-better", "slightly"), ("negligibly better / unsure", "unsure"), ("UNSURE", "unsure")],
)  # fmt: skip
def test_strength_in_words(words: str, expected: str) -> None:
    assert strength_in_words(words) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"strength": "slightly"}, "slightly"), ({"margin": "significantly better"}, "significantly"),
     ({"preference_strength": -3}, "significantly"), ({"strength": 0}, "unsure"), ({"strength": None}, None),
     ({"margin": 0.7}, None), ({"rating": 4}, None), ({}, None)],
)  # fmt: skip
def test_strength_of_a_row(fields: dict[str, Any], expected: str | None) -> None:
    assert only({**COMPARISON, **fields}).strength == expected


def test_the_strength_of_one_response_is_not_read() -> None:
    assert only({**SINGLE, "strength": "strong coffee"}).strength is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({**SINGLE, "score": 4}, [4.0]),
        ({**SINGLE, "rating": 2.5}, [2.5]),
        ({**SINGLE, "score": None}, [None]),
        ({**COMPARISON, "chosen_score": 8, "rejected_score": 3}, [8.0, 3.0]),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, [1.0, 2.0]),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}, [None, None]),
        ({"prompt": "p", "answers": [{"text": "a", "pm_score": 5}, {"text": "b", "pm_score": -1}]}, [5.0, -1.0]),
        ({"prompt": "p", "answers": [{"text": "a", "upvotes": 7, "selected": True}, {"text": "b", "upvotes": -2}]},
         [4.0, -1.0]),
    ],
)  # fmt: skip
def test_scores_are_kept(values: dict[str, Any], expected: list[float | None]) -> None:
    assert scores(only(values)) == expected


@pytest.mark.parametrize(
    ("fields", "weight"), [({"weight": 0.5}, 0.5), ({"agreement": 2}, 2.0), ({"weight": None}, 1.0), ({}, 1.0)]
)
def test_weight(fields: dict[str, Any], weight: float) -> None:
    assert only({**COMPARISON, **fields}).weight == weight


@pytest.mark.parametrize(
    ("fields", "tags"),
    [({"tags": ["safe", "en", "safe"]}, ("safe", "en")), ({"category": "closed_qa"}, ("closed_qa",)),
     ({"category": 3}, ("3",)), ({"tags": None}, ()), ({"tags": ""}, ()), ({}, ())],
)  # fmt: skip
def test_tags(fields: dict[str, Any], tags: tuple[str, ...]) -> None:
    assert only({**SINGLE, **fields}).tags == tags


def test_a_source_tags_all_its_rows() -> None:
    assert only({**SINGLE, "tags": ["en", "safe"]}, tags=("safe", "hh")).tags == ("safe", "hh", "en")


def test_a_field_of_another_meaning_can_be_left_out() -> None:
    assert only({**SINGLE, "weight": "70 kg"}, fields={"weight": ""}).weight == 1.0


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"weight": 0}, "E_WEIGHT"), ({"weight": -1}, "E_WEIGHT"), ({"weight": "much"}, "E_TYPE"),
     ({"weight": float("inf")}, "E_NON_FINITE"), ({"strength": "green"}, "E_STRENGTH"), ({"strength": 7}, "E_STRENGTH"),
     ({"tags": [{"a": 1}]}, "E_TYPE"), ({"tags": [True]}, "E_TYPE"),
     ({"chosen_score": 1, "rejected_score": 2}, "E_SCORE_ORDER")],
)  # fmt: skip
def test_bad_labels_are_refused(fields: dict[str, Any], code: str) -> None:
    found = map_one({**COMPARISON, **fields})
    assert isinstance(found, Rejection)
    assert found.code == code


def test_the_demonstration_of_the_chosen_keeps_weight_tags_and_score() -> None:
    values = {**COMPARISON, "chosen_score": 2, "rejected_score": 1, "weight": 0.5, "strength": "better"}
    mapping = FieldMapping(demonstrate_chosen=True, tags=("t",))
    _, found = map_rows([RawRow(values, 1, 0)], mapping, origin=lambda: ORIGIN, note=lambda _: None)
    assert isinstance(found, Record)
    assert (found.weight, found.tags, scores(found), found.strength) == (0.5, ("t",), [2.0], None)
