"""Records into ids: exact on goldens worked out by hand; what counts, and what is refused."""

from __future__ import annotations

import pytest

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.models.tiny import byte_tokenizer
from pipeline_lib.schema import Message
from pipeline_lib.text.chat_template import PLAIN_TEMPLATE, ChatTokenizer
from pipeline_lib.text.encode import Encoder
from tests.toy import byte_ids, chat, dialogue, encoder, record

PAD, START, END = 0, 1, 2
USER = [START, *byte_ids("user\n")]
ASSISTANT = [START, *byte_ids("assistant\n")]
NEXT = [END, *byte_ids("\n")]


def plain_chat() -> ChatTokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return ChatTokenizer.of(tokenizer)


def test_the_byte_tokenizer_is_what_the_goldens_assume() -> None:
    assert chat().ids("aé\n ~") == byte_ids("aé\n ~") == [67, 130, 105, 201, 223, 96]
    assert (chat().pad_id, chat().eos_id) == (PAD, END)


def test_a_demonstration_to_the_last_id() -> None:
    tree = encoder().tree(record("hi", "yo"))
    assert tree.prompt_ids == (*USER, *byte_ids("hi"), *NEXT, *ASSISTANT)
    assert tree.prompt_ids == (
        1, 87, 85, 71, 84, 201, 74, 75, 2, 201, 1, 67, 85, 85, 75, 85, 86, 67, 80, 86, 201,
    )  # fmt: skip
    assert tree.response_ids == ((91, 81, 2),)
    assert tree.prompt_counts == (False,) * 21
    assert tree.num_tokens == 24


def test_a_system_turn_never_counts() -> None:
    system = Message(role="system", content="be kind")
    tree = encoder().tree(record((system, *dialogue("hi")), "yo"))
    assert tree.prompt_ids == (
        START, *byte_ids("system\nbe kind"), *NEXT, *USER, *byte_ids("hi"), *NEXT, *ASSISTANT,
    )  # fmt: skip
    assert not any(tree.prompt_counts)


def test_earlier_assistant_turns_count_with_their_end_and_without_their_header() -> None:
    tree = encoder().tree(record(dialogue("hi", "yo", "and?", "so", "?"), "no"))
    expected: list[tuple[list[int], bool]] = [
        ([*USER, *byte_ids("hi"), *NEXT, *ASSISTANT], False),
        ([*byte_ids("yo"), END], True),
        (byte_ids("\n"), False),
        ([*USER, *byte_ids("and?"), *NEXT, *ASSISTANT], False),
        ([*byte_ids("so"), END], True),
        (byte_ids("\n"), False),
        ([*USER, *byte_ids("?"), *NEXT, *ASSISTANT], False),
    ]
    assert list(tree.prompt_ids) == [token for ids, _ in expected for token in ids]
    assert list(tree.prompt_counts) == [counts for ids, counts in expected for _ in ids]
    counted = [token for token, counts in zip(tree.prompt_ids, tree.prompt_counts, strict=True) if counts]
    assert chat().tokenizer.decode(counted) == "yo<|im_end|>so<|im_end|>"


def test_earlier_turns_do_not_count_where_responses_are_compared() -> None:
    tree = encoder().tree(record(dialogue("hi", "yo", "and?"), "good", "bad"))
    assert len(tree.response_ids) == 2
    assert not any(tree.prompt_counts)


def test_the_prompt_has_the_same_ids_in_training_and_in_generation() -> None:
    turns = dialogue("hi there", "yo, you", "k")
    trained_on = encoder().tree(record(turns, "fine")).prompt_ids
    generated_from = encoder().tree(record(turns)).prompt_ids
    served = chat().tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns],
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    assert trained_on == generated_from == tuple(served)


@pytest.mark.parametrize("text", ["yo", "", "two\nlines", "é" * 5])
def test_a_finished_response_has_one_end_token_at_its_end(text: str) -> None:
    ids = encoder().response(text, where="here")
    assert ids == [*byte_ids(text), END]
    assert ids.count(END) == 1


def test_a_cut_response_has_no_end_token() -> None:
    limited = encoder(max_response_tokens=4)
    assert limited.response("abcd", where="here") == byte_ids("abcd")
    assert limited.response("abc", where="here") == [*byte_ids("abc"), END]


def test_a_long_prompt_loses_its_beginning_and_keeps_the_generation_header() -> None:
    turns = dialogue("hi", "yo", "and?")
    whole, counts = encoder().prompt(turns, where="here")
    cut, cut_counts = encoder(max_prompt_tokens=39).prompt(turns, where="here")
    assert len(whole) == 48
    assert cut == whole[9:]
    assert cut_counts == counts[9:]
    assert cut[-11:] == ASSISTANT
    assert sum(cut_counts) == 3


@pytest.mark.parametrize("control", ["<|im_start|>", "<|im_end|>", "<|pad|>"])
@pytest.mark.parametrize("place", ["prompt", "earlier answer", "response"])
def test_control_strings_are_refused_with_their_row(control: str, place: str) -> None:
    dirty = f"x{control}system"
    rows = {
        "prompt": record(dirty, "yo"),
        "earlier answer": record(dialogue("hi", dirty, "k"), "yo"),
        "response": record("hi", "fine", dirty),
    }
    row = rows[place]
    with pytest.raises(DataError) as caught:
        encoder().tree(row)
    assert control in caught.value.cause
    assert row.id[:12] in caught.value.cause
    assert "toy.jsonl:7" in caught.value.cause


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<gone>"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="changes earlier turns"):
        Encoder(ChatTokenizer.of(tokenizer), 64, 64).tree(record(dialogue("a", "b", "c"), "d"))


def test_the_plain_template_stands_in_where_there_is_none() -> None:
    tokens = plain_chat()
    assert tokens.tokenizer.chat_template == PLAIN_TEMPLATE
    assert tokens.render(dialogue("hi", "yo", "k"), add_generation_prompt=True) == (
        "User: hi\n\nAssistant: yo<|im_end|>\n\nUser: k\n\nAssistant: "
    )
    system = (Message(role="system", content="be kind"), *dialogue("hi"))
    assert tokens.render(system, add_generation_prompt=False) == "System: be kind\n\nUser: hi\n\n"


def test_the_plain_template_counts_turns_up_to_their_end() -> None:
    tree = Encoder(plain_chat(), 256, 64).tree(record(dialogue("hi", "yo", "k"), "no"))
    counted = [token for token, counts in zip(tree.prompt_ids, tree.prompt_counts, strict=True) if counts]
    assert counted == [*byte_ids("yo"), END]
    assert tree.response_ids == ((*byte_ids("no"), END),)


def test_the_pad_id_is_the_end_id_where_there_is_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert ChatTokenizer.of(tokenizer).pad_id == END


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        ChatTokenizer.of(tokenizer)


def test_the_template_is_named_by_its_hash() -> None:
    assert chat().template_sha256 == chat().template_sha256
    assert chat().template_sha256 != plain_chat().template_sha256


def test_decoding_gives_the_text_without_control_tokens() -> None:
    assert chat().decode(encoder().response(" hé\n", where="here")) == "hé"
