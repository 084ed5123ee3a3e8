"""Rows by tag, by part, and the share of others."""

from __future__ import annotations

import pytest

from pipeline_lib.data.selection import RowSelection
from pipeline_lib.schema import Message, Origin, Record, Response


def rows(count: int, *tags: str) -> list[Record]:
    return [
        Record.create(
            (Message(role="user", content=f"{tags} {n}"),), (Response(content="a"), Response(content="b")), (1, 2),
            origin=Origin(source="s"), tags=tags,
        )
        for n in range(count)
    ]  # fmt: skip


SAFE, HELPFUL, OTHER = rows(90, "safe"), rows(50, "helpful", "en"), rows(20)
ALL = [*HELPFUL[:25], *SAFE, *OTHER, *HELPFUL[25:]]


def test_without_tags_every_row_is_taken() -> None:
    assert RowSelection().own(ALL) == ALL
    assert RowSelection().mixed(ALL, seed=0) == ALL


def test_rows_by_tag() -> None:
    assert RowSelection(tags=("safe",)).own(ALL) == SAFE
    assert RowSelection(tags=("en", "safe")).own(ALL) == [*HELPFUL[:25], *SAFE, *HELPFUL[25:]]
    assert RowSelection(tags=("safe",)).mixed(ALL, seed=0) == SAFE


def test_a_tenth_of_helpful_rows() -> None:
    """90 own rows and 10 others are 90 % and 10 %."""
    selection = RowSelection(tags=("safe",), mix_tags=("helpful",), mix_frac=0.1)
    found = selection.mixed(ALL, seed=0)
    assert len(found) == 100
    assert [row for row in found if "safe" in row.tags] == SAFE
    assert len([row for row in found if "helpful" in row.tags]) == 10
    assert found == [row for row in ALL if row in found], "the order of the rows stays"
    assert selection.mixed(ALL, seed=0) == found
    assert selection.mixed(ALL, seed=1) != found
    assert selection.mixed(list(reversed(ALL)), seed=0) == list(reversed(found))


def test_any_other_row_where_no_tags_are_named_and_no_more_than_there_are() -> None:
    found = RowSelection(tags=("safe",), mix_frac=0.5).mixed(ALL, seed=0)
    assert len(found) == 160
    assert len(RowSelection(tags=("safe",), mix_frac=0.25).mixed(ALL, seed=0)) == 120


def test_parts_share_no_prompt_and_leave_none_out() -> None:
    parts = [RowSelection(part=(number, 3)).mixed(ALL, seed=0) for number in (1, 2, 3)]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in ALL)
    assert all(len(part) > len(ALL) / 5 for part in parts)
    prompts = [{row.messages for row in part} for part in parts]
    assert prompts[0].isdisjoint(prompts[1] | prompts[2])
    assert parts[1] == [row for row in ALL if row in parts[1]], "the order of the rows stays"
    assert RowSelection(part=(1, 1)).mixed(ALL, seed=0) == ALL
    tagged = RowSelection(part=(2, 3), tags=("safe",))
    assert tagged.mixed(ALL, seed=0) == [row for row in parts[1] if "safe" in row.tags]
    assert tagged.own(ALL) == SAFE, "what a model is tested on is no matter of parts"


def test_a_dialogue_is_in_one_part_however_it_goes_on() -> None:
    def turns(number: int, *texts: str) -> Record:
        roles = ("user", "assistant", "user")
        opening = f"tell me about the number {number}"
        messages = tuple(Message(role=role, content=text) for role, text in zip(roles, (opening, *texts), strict=False))  # type: ignore[arg-type]
        return Record.create(
            messages, (Response(content="a"), Response(content="b")), (1, 2), origin=Origin(source="s")
        )

    dialogues = [row for n in range(20) for row in (turns(n), turns(n, "it is a number", "go on"))]
    first = RowSelection(part=(1, 2)).mixed(dialogues, seed=0)
    assert 0 < len(first) < len(dialogues)
    openings = [row.messages[0].content for row in first]
    assert all(openings.count(opening) == 2 for opening in openings)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"mix_frac": 0.1}, "no tags are named"), ({"part": (3, 2)}, "i from 1 to n"), ({"part": (0, 2)}, "i from 1 to n"),
     ({"tags": ("a",), "mix_tags": ("b",)}, "mix_frac is 0"),
     ({"tags": ("a",), "mix_frac": 1.0}, "less than 1")],
)  # fmt: skip
def test_selections_that_mean_nothing_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowSelection.model_validate(given)
