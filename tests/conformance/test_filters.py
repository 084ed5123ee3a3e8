"""What every filter rule must do, over the whole table; and one text for each reason to refuse."""

from __future__ import annotations

import random
import string
from typing import Any

import pytest
from pydantic import BaseModel

from pipeline_lib.data.filters import FILTERS
from pipeline_lib.data.rule import NeedsTokens, Rule, Tools, Transform
from pipeline_lib.errors import ConfigError
from pipeline_lib.schema import Author, Message, Origin, Record, Response, Split


class Words:
    """Counts words as tokens."""

    def count(self, text: str) -> int:
        return len(text.split())


TOOLS = Tools(tokens=Words(), special_tokens=("<|im_start|>", "<file_sep>"))
ORIGIN = Origin(source="s", place="f", line=1)


def record(*texts: str, prompt: str = "Why is the sky blue?", ranks: tuple[int, ...] = (), **more: Any) -> Record:
    if len(texts) >= 2 and not ranks:
        ranks = tuple(range(1, len(texts) + 1))
    messages = more.pop("messages", (Message(role="user", content=prompt),))
    return Record.create(messages, tuple(Response(content=text) for text in texts), ranks, origin=ORIGIN, **more)


def dialogue(*roles: str) -> Record:
    return record("r", messages=tuple(Message(role=role, content="text") for role in roles))


GOOD = [
    record("Air scatters blue light."),
    record(),
    record("Yes, it is.", "No, it is not."),
    record("ein Satz auf Deutsch: Grüße", "日本語の文です。", "😀👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿"),
    dialogue("system", "user", "assistant", "user"),
]
LONG = "the same four words " * 30
# rule, parameters, record, code: one for each reason
REFUSED: list[tuple[str, dict[str, Any], Record, str]] = [
    ("unicode", {}, record("a" + "\u0301" * 17), "E_COMBINING"),
    ("empty", {}, record("r", prompt=" \u200b\n"), "E_EMPTY_PROMPT"),
    ("empty", {}, record("good", "\u2060 "), "E_EMPTY_RESPONSE"),
    ("length", {"max_characters": 30}, record("x" * 31), "E_TOO_LONG"),
    ("length", {"min_prompt_words": 6}, record("r"), "E_TOO_SHORT"),
    ("length", {"min_response_words": 2}, record("two words", "one"), "E_TOO_SHORT"),
    ("length", {"max_response_words": 2}, record("a b c"), "E_TOO_LONG"),
    ("length", {"max_prompt_tokens": 4}, record("r"), "E_TOO_LONG"),
    ("length", {"max_response_tokens": 2}, record("a b c"), "E_TOO_LONG"),
    ("length", {"max_tokens": 7}, record("a b c"), "E_TOO_LONG"),
    ("length_ratio", {"at_most": 10}, record("x" * 201, "No."), "E_LENGTH_RATIO"),
    ("identical_pair", {}, record("Same  text", "same text\n"), "E_IDENTICAL_PAIR"),
    ("identical_pair", {}, record("caf\u00e9", "cafe\u0301"), "E_IDENTICAL_PAIR"),
    ("identical_pair", {}, record("text", "te\u200bxt"), "E_IDENTICAL_PAIR"),
    ("identical_pair", {}, record("a", "b", "A"), "E_IDENTICAL_PAIR"),
    ("roles", {}, dialogue("assistant", "user"), "E_ROLE_ORDER"),
    ("roles", {}, dialogue("user", "user"), "E_ROLE_ORDER"),
    ("roles", {}, dialogue("user", "system", "user"), "E_SYSTEM_POSITION"),
    ("roles", {"max_turns": 1}, dialogue("user", "assistant", "user"), "E_TOO_MANY_TURNS"),
    ("control_tokens", {}, record("<|im_start|>system"), "E_CONTROL_TOKEN"),
    ("control_tokens", {}, record("end </s> of"), "E_CONTROL_TOKEN"),
    ("control_tokens", {}, record("r", prompt="[INST] do [/INST]"), "E_CONTROL_TOKEN"),
    ("control_tokens", {}, record("a <file_sep> b"), "E_CONTROL_TOKEN"),
    ("control_tokens", {}, record("<|im_\u200bstart|>"), "E_CONTROL_TOKEN"),
    ("control_tokens", {}, record("<｜begin▁of▁sentence｜>"), "E_CONTROL_TOKEN"),
    ("control_tokens", {}, record("<|START_HEADER_ID|>"), "E_CONTROL_TOKEN"),
    ("repetition", {}, record(LONG), "E_REPETITION"),
    ("repetition", {}, record("one\ntwo\n" * 4), "E_REPETITION"),
    ("repetition", {}, record("a" * 201), "E_REPETITION"),
]
KEPT: list[tuple[str, dict[str, Any], Record]] = [
    ("repetition", {}, record("a fine answer", LONG)),  # the rejected response may repeat itself
    ("identical_pair", {"allow_equal_ranks": True}, record("a", "A", "b", ranks=(1, 1, 2))),
    ("length_ratio", {"at_most": 10}, record("x" * 199, "No.")),
    ("control_tokens", {"allow": ["</s>"]}, record("end </s> of")),
    ("length", {"max_prompt_tokens": 5, "max_response_tokens": 3, "max_tokens": 8}, record("a b c")),
]


def rules() -> list[str]:
    return list(FILTERS)


@pytest.mark.parametrize("name", rules())
def test_contract(name: str) -> None:
    rule = FILTERS.build({"name": name})
    assert isinstance(rule, BaseModel)
    assert isinstance(rule, Rule)
    assert type(rule).model_config["frozen"] is True
    for field_name, field in type(rule).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
    with pytest.raises(ConfigError, match="unknown key 'no_such'"):
        FILTERS.build({"name": name, "no_such": 1})


@pytest.mark.parametrize("name", rules())
def test_good_records_pass_every_rule(name: str) -> None:
    rule = FILTERS.build({"name": name})
    assert [rule.reject(one, TOOLS) for one in GOOD] == [None] * len(GOOD)


@pytest.mark.parametrize("name", rules())
def test_every_rule_has_a_case(name: str) -> None:
    assert any(case[0] == name for case in REFUSED)


@pytest.mark.parametrize(("name", "parameters", "bad", "code"), REFUSED)
def test_refused(name: str, parameters: dict[str, Any], bad: Record, code: str) -> None:
    refusal = FILTERS.build({"name": name, **parameters}).reject(bad, TOOLS)
    assert refusal is not None
    assert refusal.code == code
    assert refusal.reason
    assert "\n" not in refusal.reason


@pytest.mark.parametrize(("name", "parameters", "good"), KEPT)
def test_kept(name: str, parameters: dict[str, Any], good: Record) -> None:
    assert FILTERS.build({"name": name, **parameters}).reject(good, TOOLS) is None


def random_records(count: int) -> list[Record]:
    draw = random.Random(0)
    alphabet = string.ascii_letters + " \n\t.\r\x0b\x1b[0mäé\u0301\u200b\u200d\u2028\u202e\ufeff\U000e0041<|s>/INST]"

    def text() -> str:
        return "".join(draw.choice(alphabet) for _ in range(draw.randrange(0, 40))) or "x"

    return [record(*(text() for _ in range(draw.randrange(0, 4))), prompt=text()) for _ in range(count)]


@pytest.mark.parametrize("name", rules())
def test_a_verdict_depends_on_the_record_alone(name: str) -> None:
    records = random_records(300)
    rule = FILTERS.build({"name": name})
    verdicts = {one.id: rule.reject(one, TOOLS) for one in records}
    random.Random(1).shuffle(records)
    other = FILTERS.build({"name": name})
    assert {one.id: other.reject(one, TOOLS) for one in records} == verdicts


def rewriting_rules() -> list[str]:
    return [name for name in FILTERS if isinstance(FILTERS.build({"name": name}), Transform)]


def test_some_rule_rewrites() -> None:
    assert rewriting_rules() == ["unicode"]


@pytest.mark.parametrize("name", rewriting_rules())
def test_a_second_pass_changes_nothing(name: str) -> None:
    rule = FILTERS.build({"name": name})
    for one in random_records(500) + GOOD:
        once = rule.transform(one)
        assert rule.transform(once) == once
        assert rule.reject(once, TOOLS) is None or rule.reject(one, TOOLS) is not None
        assert once == Record.create(
            once.messages, once.responses, once.ranks, origin=one.origin, group=one.group, split=one.split
        )


@pytest.mark.parametrize("name", rewriting_rules())
def test_a_rewrite_keeps_all_but_texts_and_id(name: str) -> None:
    """Whatever fields a record has, now and later: only what depends on its texts may become another."""
    hidden = "a\u200bb\r\nc"
    author = Author(kind="human", name="p1")
    answers = (Response(content=hidden, score=4.0, author=author), Response(content="other", score=1.0))
    messages = (Message(role="user", content=f"{hidden}?"),)
    shared: dict[str, Any] = {"origin": ORIGIN, "group": "g", "split": Split.REWARD, "weight": 0.5, "tags": ("safe",)}
    for before in (
        Record.create(messages, answers, (1, 2), strength="slightly", **shared),
        Record.create(messages, answers[:1], desirable=False, **shared),
    ):
        after = FILTERS.build({"name": name}).transform(before)
        assert after.id != before.id
        assert after.model_copy(update={"id": before.id, "messages": messages, "responses": before.responses}) == before
        assert [one.score for one in after.responses] == [one.score for one in before.responses]
        assert [one.author for one in after.responses] == [one.author for one in before.responses]


def test_only_length_asks_for_tokens_and_only_with_a_bound_in_tokens() -> None:
    asking = [name for name in FILTERS if isinstance(FILTERS.build({"name": name}), NeedsTokens)]
    assert asking == ["length"]
    assert not FILTERS.build({"name": "length"}).needs_tokens
    assert FILTERS.build({"name": "length", "max_tokens": 9}).needs_tokens


def test_unknown_rule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'repetition'"):
        FILTERS.build({"name": "repetitions"})
