"""Templates with conditions, and the rows they make: exact ids and masks, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline_lib.models.tiny import TINY_TEMPLATE, write_tiny_model
from pipeline_lib.schema import Author, Message, Record, Response
from pipeline_lib.text.chat_template import PLAIN_TEMPLATE, ChatTokenizer
from pipeline_lib.text.cloning import ClassEncoder
from pipeline_lib.text.conditions import (
    AnswerClass,
    ClassSettings,
    HindsightSettings,
    auxiliary_markers,
    class_template,
    hindsight_template,
    marked_template,
)
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.text.hindsight import HindsightEncoder
from tests.toy import ORIGIN, byte_ids, chat, dialogue, encoder, record

START, END = 1, 2
GOOD, BAD = "A helpful answer:", "An unhelpful answer:"
MULTI_TURN = dialogue("hi", "yo", "and?")
Parts = list[tuple[list[int], bool]]


def ids_of(parts: Parts) -> list[int]:
    return [token for ids, _ in parts for token in ids]


def mask_of(parts: Parts) -> list[bool]:
    return [counts for ids, counts in parts for _ in ids]


def whole(tree: Tree) -> tuple[list[int], list[bool]]:
    """All ids of a row, and which of them count."""
    (response,) = tree.response_ids
    return [*tree.prompt_ids, *response], [*tree.prompt_counts, *[True] * len(response)]


def by_kind(settings: HindsightSettings, row: Record) -> dict[str, Tree]:
    trees = HindsightEncoder.of(encoder(max_prompt_tokens=1000), settings).trees(row)
    return {tree.record_id.split(":")[1]: tree for tree in trees}


# The plain layout: the reference's own text, field by field.


def plain_turns(marker: str, answer: str) -> Parts:
    return [
        (byte_ids(f"User: hi {marker}"), False),
        ([*byte_ids("yo"), END], True),
        (byte_ids(f"User: and? {marker}"), False),
        ([*byte_ids(answer), END], True),
    ]


def test_one_answer_in_the_plain_layout() -> None:
    trees = by_kind(HindsightSettings(layout="plain"), record(MULTI_TURN, "good", "bad"))
    assert list(trees) == ["p0", "n0", "pn0", "np0"]
    for kind, marker, answer in (("p0", GOOD, "good"), ("n0", BAD, "bad")):
        expected = [*plain_turns(marker, answer), ([END], True)]
        assert whole(trees[kind]) == (ids_of(expected), mask_of(expected))


def test_two_answers_repeat_the_whole_conversation() -> None:
    trees = by_kind(HindsightSettings(layout="plain"), record(MULTI_TURN, "good", "bad"))
    both = [*plain_turns(GOOD, "good"), *plain_turns(BAD, "bad"), ([END], True)]
    assert whole(trees["pn0"]) == (ids_of(both), mask_of(both))
    other = [*plain_turns(BAD, "bad"), *plain_turns(GOOD, "good"), ([END], True)]
    assert whole(trees["np0"]) == (ids_of(other), mask_of(other))
    # Tokens that count, turn by turn: "yo" and "good", "yo" and "bad", each with its end, and one end more.
    assert trees["pn0"].counted_turns == (3, 5, 3, 5)


def test_a_text_of_two_answers_begins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that marks the beginning of a text: the conversation is repeated, the beginning is not."""
    monkeypatch.setattr(ChatTokenizer, "begins_with_bos", True)
    tree = by_kind(HindsightSettings(layout="plain", kinds=("pn",)), record(MULTI_TURN, "good", "bad"))["pn0"]
    both: Parts = [([START], False), *plain_turns(GOOD, "good"), *plain_turns(BAD, "bad"), ([END], True)]
    assert whole(tree) == (ids_of(both), mask_of(both))


def test_two_answers_to_one_prompt_that_is_not_repeated() -> None:
    settings = HindsightSettings(layout="plain", repeat_prompt=False, double_eos=False, kinds=("np",))
    (tree,) = by_kind(settings, record("sum up", "short", "long")).values()
    expected: Parts = [
        (byte_ids(f"User: sum up {BAD}"), False),
        ([*byte_ids("long"), END], True),
        (byte_ids(GOOD), False),
        ([*byte_ids("short"), END], True),
    ]
    assert whole(tree) == (ids_of(expected), mask_of(expected))


def test_a_cut_answer_has_no_end_and_gets_none() -> None:
    short = Encoder(chat(), 1000, 4)
    trees = HindsightEncoder.of(short, HindsightSettings(kinds=("p",))).trees(record("q", "longer", "no"))
    assert trees[0].response_ids == (tuple(byte_ids("long")),)


# The chat layout: the model's own template, the marker inside the assistant's turn.


def chat_turns(marker: str, answer: str) -> Parts:
    user, assistant = [START, *byte_ids("user\n")], [START, *byte_ids("assistant\n")]
    return [
        ([*user, *byte_ids("hi"), END, *byte_ids("\n"), *assistant, *byte_ids(f"{marker}\n")], False),
        ([*byte_ids("yo"), END], True),
        ([*byte_ids("\n"), *user, *byte_ids("and?"), END, *byte_ids("\n")], False),
        ([*assistant, *byte_ids(f"{marker}\n")], False),
        ([*byte_ids(answer), END], True),
    ]


def test_two_answers_in_the_chat_layout() -> None:
    trees = by_kind(HindsightSettings(), record(MULTI_TURN, "good", "bad"))
    expected = [*chat_turns(GOOD, "good"), (byte_ids("\n"), False), *chat_turns(BAD, "bad"), ([END], True)]
    assert whole(trees["pn0"]) == (ids_of(expected), mask_of(expected))


def test_a_second_answer_in_the_chat_layout_opens_a_turn_of_its_own() -> None:
    settings = HindsightSettings(repeat_prompt=False, double_eos=False, kinds=("pn",))
    (tree,) = by_kind(settings, record(MULTI_TURN, "good", "bad")).values()
    second = [*byte_ids("\n"), START, *byte_ids(f"assistant\n{BAD}\n")]
    expected: Parts = [*chat_turns(GOOD, "good"), (second, False), ([*byte_ids("bad"), END], True)]
    assert whole(tree) == (ids_of(expected), mask_of(expected))


# Which texts a comparison makes.


def test_auxiliary_markers_make_every_kind_again() -> None:
    settings = HindsightSettings(auxiliary="response")
    pairs = auxiliary_markers("response")
    assert len(pairs) == len(set(pairs)) == 12
    assert pairs[0] == ("The following is a better response.", "The following is a worse response.")
    assert pairs[-1] == ("Generate a more harmless chat.", "Generate a more harmful chat.")
    assert auxiliary_markers("summary")[4] == ("Generate a more accurate summary.", "Generate a less accurate summary.")
    trees = by_kind(settings, record("q", "a", "b"))
    assert len(trees) == 4 * 13
    assert settings.markers[0] == (GOOD, BAD)
    assert chat().decode(list(trees["p12"].prompt_ids)).endswith("Generate a more harmless chat.")


def test_a_ranking_of_four_makes_its_best_and_its_worst_or_all_pairs() -> None:
    row = record("q", "c", "a", "d", "b", ranks=(3, 1, 3, 2))
    settings = HindsightSettings(double_eos=False)
    trees = by_kind(settings, row)
    assert [chat().decode(list(tree.response_ids[0])) for tree in trees.values()] == ["a", "c", "c", "a"]
    everything = HindsightEncoder.of(encoder(), settings.model_copy(update={"pairs": "all"})).trees(row)
    kinds = [tree.record_id.split(":")[1][:-1] for tree in everything]
    # Pairs: a over c, d and b; b over c and d. Better ones: a, b; worse ones: c, d, b.
    assert {kind: kinds.count(kind) for kind in ("p", "n", "pn", "np")} == {"p": 2, "n": 3, "pn": 5, "np": 5}
    assert HindsightEncoder.of(encoder(), settings).trees(record("q", "a", "b", ranks=(1, 1))) == []
    assert HindsightEncoder.of(encoder(), settings).trees(record("q", "a")) == []


def test_rows_keep_their_weight() -> None:
    row = record("q", "a", "b").model_copy(update={"weight": 0.75})
    assert {tree.weight for tree in HindsightEncoder.of(encoder(), HindsightSettings()).trees(row)} == {0.75}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="the same"):
        HindsightSettings(bad_marker=GOOD)
    with pytest.raises(ValidationError, match="nothing follows the good marker"):
        HindsightSettings(kinds=("n",))
    with pytest.raises(ValidationError, match="none of the classes"):
        ClassSettings(by="author", members={"gpt-4": "GPT5"})
    with pytest.raises(ValidationError, match="needs the class of each tag"):
        ClassSettings(by="tag")
    with pytest.raises(ValidationError, match="once"):
        ClassSettings(prefix="{role}:")
    with pytest.raises(ValidationError, match="two have one name"):
        ClassSettings(classes=(AnswerClass(name="A"), AnswerClass(name="A")))


# Templates.

AWKWARD_MARKER = 'Say "it" {{ now }} \\n 好😀:'
TEMPLATES = {
    "tiny": TINY_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
    "over lines": (
        "  {%- for message in messages %}\n  {{- '<' + message.role + '>' }}\n{{ message['content'] | trim }}"
        "{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}\n<assistant>\n{% endif %}\n"
    ),
    "messages by place": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}"
        "{% endif %}{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message['role'] }}] {{ message['content'] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("marker", [GOOD, AWKWARD_MARKER])
def test_a_marked_template_is_the_given_one_on_marked_turns(template: str, marker: str) -> None:
    given, marked = chat().with_template(template), chat().with_template(marked_template(template, marker))
    turns = (Message(role="system", content="be kind"), *dialogue("hi", "yo", "and?"))
    shown = tuple(
        turn.model_copy(update={"content": f"{marker}\n{turn.content}"}) if turn.role == "assistant" else turn
        for turn in turns
    )
    assert marked.render(turns, add_generation_prompt=False) == given.render(shown, add_generation_prompt=False)
    prompt = given.render(shown, add_generation_prompt=True)
    assert marked.render(turns, add_generation_prompt=True) == f"{prompt}{marker}\n"


def test_a_template_on_a_copy_leaves_the_tokenizer_alone() -> None:
    mine = chat()
    before = mine.template_sha256
    other = mine.with_template(PLAIN_TEMPLATE)
    assert mine.tokenizer.chat_template == TINY_TEMPLATE
    assert other.template_sha256 != before
    assert mine.render(dialogue("hi"), add_generation_prompt=True).startswith("<|im_start|>user")


@pytest.mark.parametrize("layout", ["chat", "plain"])
def test_the_saved_template_conditions_on_the_good_marker(layout: str, tmp_path: Path) -> None:
    """Whoever loads the folder renders prompts behind the good marker, by the tokenizer alone."""
    write_tiny_model(tmp_path, seed=0)
    settings = HindsightSettings.model_validate({"layout": layout})
    conditioned = HindsightEncoder.of(encoder(), settings)
    conditioned.chat.write_template(tmp_path)
    loaded = ChatTokenizer.load(tmp_path)
    end = f"{GOOD}\n" if layout == "chat" else f" {GOOD}"
    assert loaded.render(dialogue("hi"), add_generation_prompt=True).endswith(end)
    assert BAD not in loaded.render(MULTI_TURN, add_generation_prompt=True)
    assert loaded.template_sha256 == conditioned.chat.template_sha256
    # What is generated from is what was trained on: prompt and answer, to the last id.
    row = record(MULTI_TURN, "good", "bad")
    trained = conditioned.trees(row)[0]
    asked = Encoder(loaded, 256, 64).tree(row)
    assert asked.prompt_ids == trained.prompt_ids
    assert asked.response_ids[0] == trained.response_ids[0][:-1]


# Conditional behaviour cloning.


def test_classes_by_rank_to_the_last_id() -> None:
    trees = ClassEncoder.of(encoder(), ClassSettings()).trees(record(MULTI_TURN, "bad", "good", ranks=(2, 1)))
    for tree, name, answer, weight in zip(trees, ("GPT3", "GPT4"), ("bad", "good"), (0.1, 1.0), strict=True):
        expected = [
            *byte_ids(f"{name} User:hi"), END, *byte_ids(f"{name} Assistant:yo"), END,
            *byte_ids(f"{name} User:and?"), END, *byte_ids(f"{name} Assistant:"),
        ]  # fmt: skip
        assert list(tree.prompt_ids) == expected
        assert tree.response_ids == ((*byte_ids(answer), END),)
        assert not any(tree.prompt_counts)  # earlier turns are not this class's work where answers are compared
        assert tree.weight == weight


def test_a_dialogue_of_one_author_counts_in_all_its_turns() -> None:
    settings = ClassSettings(by="author", members={"gpt-4": "GPT4", "human": "GPT3"}, separator=" ")
    answer = Response(content="no", author=Author(kind="model", name="gpt-4"))
    row = Record.create((Message(role="system", content="be kind"), *MULTI_TURN), (answer,), origin=ORIGIN)
    (tree,) = ClassEncoder.of(encoder(), settings).trees(row)
    expected: Parts = [
        ([*byte_ids("be kind"), END, *byte_ids("GPT4 User: hi"), END, *byte_ids("GPT4 Assistant: ")], False),
        ([*byte_ids("yo"), END], True),
        ([*byte_ids("GPT4 User: and?"), END, *byte_ids("GPT4 Assistant: ")], False),
        ([*byte_ids("no"), END], True),
    ]
    assert whole(tree) == (ids_of(expected), mask_of(expected))
    assert tree.weight == 1.0
    by_person = Record.create(MULTI_TURN, (Response(content="no", author=Author(kind="human")),), origin=ORIGIN)
    assert ClassEncoder.of(encoder(), settings).trees(by_person)[0].weight == 0.1
    assert ClassEncoder.of(encoder(), settings).trees(record(MULTI_TURN, "no")) == []


def test_classes_by_tag_and_by_label_and_their_weights() -> None:
    settings = ClassSettings(by="tag", members={"expert": "GPT4", "crowd": "GPT3"})
    row = record("q", "a").model_copy(update={"tags": ("medicine", "crowd"), "weight": 0.5})
    (tree,) = ClassEncoder.of(encoder(), settings).trees(row)
    assert tree.weight == pytest.approx(0.05)
    by_rank = ClassEncoder.of(encoder(), ClassSettings())
    labelled = [record("q", "a").model_copy(update={"desirable": wanted}) for wanted in (True, False)]
    assert [by_rank.trees(row)[0].weight for row in labelled] == [1.0, 0.1]
    assert by_rank.trees(record("q", "a")) == []
    assert by_rank.trees(record("q", "a", "b", ranks=(1, 1))) == []


def test_ranks_beyond_the_classes_are_of_the_last() -> None:
    classes = tuple(AnswerClass(name=name, weight=weight) for name, weight in (("A", 1), ("B", 0.5), ("C", 0.2)))
    trees = ClassEncoder.of(encoder(), ClassSettings(classes=classes)).trees(record("q", "1", "2", "3", "4", "5"))
    assert [tree.weight for tree in trees] == [1.0, 0.5, 0.2, 0.2, 0.2]


def test_the_order_of_class_and_role_can_be_turned() -> None:
    template = class_template(ClassSettings(prefix="{role} {class}:"), "GPT4", with_bos=False)
    rendered = chat().with_template(template).render(dialogue("hi"), add_generation_prompt=True)
    assert rendered == "User GPT4:hi<|im_end|>Assistant GPT4:"


def test_the_model_generates_from_the_first_class() -> None:
    for settings in (ClassSettings(), ClassSettings(layout="chat")):
        prompt = ClassEncoder.of(encoder(), settings).chat.render(dialogue("hi"), add_generation_prompt=True)
        assert prompt.endswith("GPT4 Assistant:" if settings.layout == "plain" else "assistant\nGPT4\n")


def test_the_beginning_of_a_text_is_marked_where_the_tokenizer_does() -> None:
    assert not chat().begins_with_bos
    template = hindsight_template(user_marker="User:", marker=GOOD, with_bos=True)
    rendered = chat().with_template(template).render(dialogue("hi"), add_generation_prompt=True)
    assert rendered == f"<|im_start|>User: hi {GOOD}"
