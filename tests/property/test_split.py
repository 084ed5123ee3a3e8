"""One prompt, one split: whatever else is in the set."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_lib.data.split import (
    SplitConfig,
    SplitFractions,
    assign_splits,
    check_disjoint,
    split_keys,
)
from pipeline_lib.errors import DataError
from pipeline_lib.schema import Message, Origin, Record, Response, Split

CONFIG = SplitConfig()


def record(*texts: str, group: str = "", line: int = 1) -> Record:
    roles = ["user", "assistant"] * len(texts)
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, texts, strict=False))
    return Record.create(
        messages, (Response(content="r"),), origin=Origin(source="s", place="f", line=line), group=group
    )


def divide(records: list[Record], config: SplitConfig = CONFIG) -> list[Split]:
    return assign_splits([split_keys(row, config) for row in records], config)


prompts = st.sampled_from([f"question number {n} about trees" for n in range(12)] + ["hi", "Hi ", "HI", "ｈｉ"])
records = st.lists(
    st.builds(lambda text, group: record(text, group=group), prompts, st.sampled_from(["", "", "g1", "g2", "g3"])),
    max_size=30,
)


@given(records)
@settings(max_examples=200, deadline=None)
def test_a_prompt_and_a_group_have_one_split(rows: list[Record]) -> None:
    splits = divide(rows)
    check_disjoint(row.model_copy(update={"split": split}) for row, split in zip(rows, splits, strict=True))
    for (one, first), (other, second) in combinations(zip(rows, splits, strict=True), 2):
        if one.group == other.group:
            assert first is second


@given(records, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_rows_does_not_matter(rows: list[Record], random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    splits = divide(rows)
    assert divide([rows[index] for index in order]) == [splits[index] for index in order]


def test_more_rows_move_no_row() -> None:
    rows = [record(f"what is the square of {n}", group=f"item {n // 2}") for n in range(200)]
    more = [record(f"name the capital number {n}", group=f"other {n}") for n in range(500)]
    phrasings = [record(f"square {n} for me please", group=f"item {n // 2}") for n in range(200)]
    before = divide(rows)
    assert divide(rows + more)[:200] == before
    assert divide(rows + phrasings)[:200] == before


def test_fractions_are_met_and_seeds_differ() -> None:
    rows = [record(f"tell me about subject {n}") for n in range(5000)]
    splits = divide(rows)
    for split, fraction in CONFIG.fractions.by_split().items():
        # 5 standard deviations of a binomial share
        assert abs(splits.count(split) / 5000 - fraction) < 5 * (fraction * (1 - fraction) / 5000) ** 0.5
    other = divide(rows, SplitConfig(seed=1))
    assert sum(one is two for one, two in zip(splits, other, strict=True)) < 2500


def test_a_split_with_fraction_0_gets_nothing() -> None:
    config = SplitConfig(fractions=SplitFractions(sft=0.5, reward=0.5, policy=0, reward_test=0, gate=0))
    assert set(divide([record(f"tell me about subject {n}") for n in range(500)], config)) == {
        Split.SFT,
        Split.REWARD,
    }


def test_dialogues_with_one_opening_stay_together() -> None:
    opening = "How do I bake a cake?"
    rows = [
        record(opening),
        record(opening, "a", "And with cream?"),
        record(opening, "b", f"{opening} again"),
    ]
    assert len(set(divide(rows))) == 1
    apart = SplitConfig(by_opening=False, seed=3)
    many = [record(opening, f"answer {n}", f"follow-up {n}") for n in range(50)]
    assert len(set(divide(many, apart))) > 1
    assert len(set(divide(many))) == 1


def test_greetings_do_not_join_dialogues() -> None:
    many = [record("Hello!", "Hi.", f"What is the number {n}?") for n in range(100)]
    assert len(set(divide(many))) == 5


def test_the_check_names_both_rows() -> None:
    one = record("Same  Prompt", line=3).model_copy(update={"split": Split.SFT})
    other = record("same prompt", line=8).model_copy(update={"split": Split.GATE})
    with pytest.raises(DataError, match=r"f:3 in sft, f:8 in gate"):
        check_disjoint([one, other])


def test_fractions_must_add_up() -> None:
    with pytest.raises(ValueError, match=r"add up to 0\.9"):
        SplitFractions(sft=0.3)
