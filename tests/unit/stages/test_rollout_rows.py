"""Sampled and scored responses become comparisons and demonstrations, and no sample is lost on the way."""

from __future__ import annotations

import pytest

from pipeline_lib.errors import DataError
from pipeline_lib.schema import Author, Split
from pipeline_lib.stages.rollout_rows import (
    SampledPrompt,
    ScoredResponse,
    comparison,
    demonstrations,
    with_earlier,
)
from tests.toy import record

AUTHOR = Author(kind="model", name="model/abc", sampling={"temperature": 1.0})


def sampled(prompt: str, *responses: tuple[str, float], unusable: frozenset[str] = frozenset()) -> SampledPrompt:
    """A prompt with responses of some texts and scores."""
    return SampledPrompt(
        prompt=record(prompt).model_copy(update={"split": Split.POLICY}),
        responses=tuple(
            ScoredResponse(
                content=text, author=AUTHOR, score=score, num_tokens=len(text), is_finished=True,
                is_usable=text not in unusable,
            )
            for text, score in responses
        ),
    )  # fmt: skip


def test_responses_are_ranked_by_score_and_keep_score_and_author() -> None:
    row = comparison(sampled("q", ("low", -1.0), ("high", 2.0), ("mid", 0.5)), compared="all")
    assert [response.content for response in row.responses] == ["high", "mid", "low"]
    assert [response.score for response in row.responses] == [2.0, 0.5, -1.0]
    assert row.ranks == (1, 2, 3)
    assert [response.author for response in row.responses] == [AUTHOR] * 3
    assert (row.split, row.origin.place, row.group) == (Split.POLICY, "toy.jsonl", record("q").group)


def test_equal_scores_are_ties_and_equal_texts_are_one_response() -> None:
    row = comparison(sampled("q", ("a", 1.0), ("b", 1.0), ("a", 3.0), ("c", 0.0)), compared="all")
    assert [(each.content, each.score) for each in row.responses] == [("a", 3.0), ("b", 1.0), ("c", 0.0)]
    row = comparison(sampled("q", ("a", 1.0), ("b", 1.0), ("c", 0.0)), compared="all")
    assert row.ranks == (1, 1, 3)


def test_the_best_may_be_compared_with_the_worst_alone() -> None:
    row = comparison(sampled("q", ("a", 1.0), ("b", 4.0), ("c", 0.0)), compared="best_and_worst")
    assert [(each.content, rank) for each, rank in zip(row.responses, row.ranks, strict=True)] == [("b", 1), ("c", 2)]


@pytest.mark.parametrize(
    "each",
    [
        sampled("q", ("a", 1.0), ("a", 2.0)),
        sampled("q", ("a", 1.0), ("b", 1.0)),
        sampled("q", ("a", 1.0), ("", 2.0), unusable=frozenset({""})),
        sampled("q"),
    ],
)
def test_a_prompt_without_two_different_responses_stays_a_prompt(each: SampledPrompt) -> None:
    row = comparison(each, compared="all")
    assert row.kind == "prompt"
    assert row == each.prompt


ROWS = [
    sampled("one", ("a", 0.1), ("b", 0.9), ("", 5.0), unusable=frozenset({""})),
    sampled("two", ("c", 0.8), ("d", 0.7)),
    sampled("three", ("e", -2.0), ("f", -3.0)),
]


def test_the_best_of_each_prompt_is_its_demonstration() -> None:
    rows = demonstrations(ROWS, select="best_of_prompt", top_frac=0.2)
    assert [(row.messages[0].content, row.responses[0].content) for row in rows] == [
        ("one", "b"), ("two", "c"), ("three", "e"),
    ]  # fmt: skip
    assert {(row.kind, row.split) for row in rows} == {("demonstration", Split.SFT)}


@pytest.mark.parametrize(("top_frac", "texts"), [(0.5, ["b", "c", "d"]), (0.3, ["b", "c"]), (0.01, ["b"])])
def test_the_top_share_is_of_all_samples_whatever_their_prompts(top_frac: float, texts: list[str]) -> None:
    # int(7 * 0.5) = 3 and int(7 * 0.3) = 2 of the seven samples, the unusable one counted as sampled.
    rows = demonstrations(ROWS, select="top_share", top_frac=top_frac)
    assert [row.responses[0].content for row in rows] == texts


def test_nothing_usable_is_said() -> None:
    with pytest.raises(DataError, match="none of the responses sampled for 1 prompts is usable"):
        demonstrations([sampled("q", ("", 1.0), unusable=frozenset({""}))], select="best_of_prompt", top_frac=0.2)


def test_the_best_over_all_rounds_may_be_an_earlier_one() -> None:
    first = [sampled("one", ("a", 3.0)), sampled("two", ("b", 0.0))]
    second = [sampled("two", ("c", 1.0)), sampled("three", ("d", 0.5)), sampled("one", ("e", 2.0))]
    both = with_earlier(second, first)
    assert [each.prompt.messages[0].content for each in both] == ["one", "two", "three"]
    assert sum(len(each.responses) for each in both) == 5
    best = demonstrations(both, select="best_of_prompt", top_frac=0.2)
    assert [row.responses[0].content for row in best] == ["a", "c", "d"]
    assert with_earlier(second, []) == second
