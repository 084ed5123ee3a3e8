"""Human evaluations: labels of all pairs, votes, verdicts in words, ranked systems."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data.compared import ranks_of_pairs
from pipeline_lib.data.mapping import FieldMapping, map_rows
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.read import RawRow
from pipeline_lib.data.refusal import BadRowError
from pipeline_lib.data.sources.jsonl import Jsonl
from pipeline_lib.schema import Author, Origin, Record, Rejection

SHARED_DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
PAIR = {"prompt": "p", "response1": "a", "response2": "b"}


def map_one(values: dict[str, Any]) -> Record | Rejection:
    origin = Origin(source="s", place="f")
    (found,) = map_rows([RawRow(values, 1, 0)], FieldMapping(), origin=lambda: origin, note=lambda _: None)
    return found


def only(values: dict[str, Any]) -> Record:
    found = map_one(values)
    assert isinstance(found, Record), found
    return found


@pytest.mark.parametrize("num", [2, 3, 4])
def test_every_order_with_ties_is_found_again(num: int) -> None:
    """Labels made from ranks give the ranks back."""
    for given in product(range(1, num + 1), repeat=num):
        dense = {rank: place for place, rank in enumerate(sorted(set(given)), start=1)}
        ranks = tuple(dense[rank] for rank in given)
        labels = [
            0 if ranks[i] == ranks[j] else 1 if ranks[i] < ranks[j] else 2 for i, j in combinations(range(num), 2)
        ]
        assert ranks_of_pairs(labels, num) == ranks


@pytest.mark.parametrize(
    ("labels", "code"),
    [([1, 2, 1], "E_CONTRADICTION"), ([0, 0, 1], "E_CONTRADICTION"), ([1, 2], "E_RANKS"), ([1, 1, 1, 1], "E_RANKS")],
)
def test_labels_without_an_order_are_refused(labels: list[int], code: str) -> None:
    with pytest.raises(BadRowError) as caught:
        ranks_of_pairs(labels, 3)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("verdict", "ranks"),
    [(1, (1, 2)), (2, (2, 1)), (0, (1, 1)), (1.2, (1, 2)), (1.9, (2, 1)), (1.5, (1, 1)), ("1", (1, 2)), ("b", (2, 1)),
     ("tie", (1, 1)), ("tie (bothbad)", (1, 1)), ("response2", (2, 1)), ("model_a", (1, 2)),
     ("a-is-better", (1, 2)), ("b-is-slightly-better", (2, 1))],
)  # fmt: skip
def test_one_verdict(verdict: Any, ranks: tuple[int, ...]) -> None:
    assert only({**PAIR, "preference": verdict}).ranks == ranks


@pytest.mark.parametrize(
    ("verdict", "strength"),
    [("a-is-better", "better"), ("b-is-slightly-better", "slightly"), ("tie", None), ("model_a", None), (1, None)],
)
def test_strength_of_a_verdict(verdict: Any, strength: str | None) -> None:
    assert only({**PAIR, "preference": verdict}).strength == strength


@pytest.mark.parametrize(
    ("votes", "ranks", "weight"),
    [((1, 1, 1), (1, 2), 1.0), ((2, 1, 2), (2, 1), 2 / 3), ((0, 0, 1), (1, 1), 2 / 3),
     # Nobody agrees: a tie, which one of three voted for; and one against one, where each is half right.
     ((0, 1, 2), (1, 1), 1 / 3), ((1, 2), (1, 1), 1 / 2)],
)  # fmt: skip
def test_annotators_vote(votes: tuple[int, ...], ranks: tuple[int, ...], weight: float) -> None:
    record = only({**PAIR, **{f"annotator{n}": vote for n, vote in enumerate(votes, start=1)}})
    assert record.ranks == ranks
    assert record.weight == pytest.approx(weight)


@pytest.mark.parametrize(
    ("fields", "code"),
    [({"preference": 3}, "E_VERDICT"), ({"preference": 0.5}, "E_VERDICT"),
     ({"preference": "the blue one"}, "E_VERDICT"), ({"preference": [1, 1]}, "E_RANKS"),
     ({"preference": [3]}, "E_VERDICT"),
     ({"preference": 1, "response3": "c"}, "E_RANKS"), ({"preference": 1, "response2": " "}, "E_EMPTY_RESPONSE")],
)  # fmt: skip
def test_bad_verdicts_are_refused(fields: dict[str, Any], code: str) -> None:
    found = map_one({**PAIR, **fields})
    assert isinstance(found, Rejection)
    assert found.code == code


def test_instructions_and_models_are_kept() -> None:
    record = only({
        "instruction": "i", "input": "x", "completion_a": "a", "completion_b": "b", "model_a": "m1", "model_b": "m2",
        "preference": "b-is-better",
    })  # fmt: skip
    assert record.messages[-1].content == "i\n\nx"
    authors = [response.author for response in record.responses]
    assert authors == [Author(kind="model", name="m1"), Author(kind="model", name="m2")]


def review(worker: int, rank: int) -> dict[str, int]:
    return {"worker_id": worker, "overall-rank": rank}


def test_systems_are_ranked_and_reviewers_weigh() -> None:
    """Ranking a, b, c; reviewer 1 agrees in 3 of 3 pairs, reviewer 2 (a, c, b) in 2, 3 (all equal) in half of 3."""
    overall = [{"overall-ranking": place, "overall-rating": 90.0 - place} for place in (1, 2, 3)]
    ranks = {"a": (1, 1, 1), "b": (2, 3, 1), "c": (3, 2, 1)}
    record = only({
        "question_text": "q",
        "systems": {
            name: {"response": f"text {name}", "overall": overall[place],
                   "reviews": [review(worker, rank) for worker, rank in enumerate(ranks[name])]}
            for place, name in enumerate(ranks)
        },
    })  # fmt: skip
    assert record.ranks == (1, 2, 3)
    assert [response.score for response in record.responses] == [89.0, 88.0, 87.0]
    assert record.weight == pytest.approx((3 + 2 + 1.5) / 9)
    assert record.responses[0].author == Author(kind="model", name="a")


@pytest.mark.parametrize(
    ("name", "num_responses", "num_pairs"),
    [("finegrained_rlhf/qa_feedback_k4", 4, 1325), ("squality_ranking/human_rankings_k3", 3, 120)],
)
def test_real_rankings(name: str, num_responses: int, num_pairs: int) -> None:
    path = SHARED_DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data sets are not here")
    records = [row for row in Jsonl(path=str(path)).rows(LocalPlaces(), lambda _: None) if isinstance(row, Record)]
    assert {len(record.responses) for record in records} == {num_responses}
    pairs = [(i, j) for record in records for i, j in combinations(record.ranks, 2) if i != j]
    assert len(pairs) == num_pairs
