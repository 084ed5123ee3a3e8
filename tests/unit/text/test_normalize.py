"""Texts in one form; texts that look the same compare equal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_lib.text.normalize import (
    comparison_key,
    has_lone_surrogate,
    has_zalgo,
    normalise,
)

FAMILY = "👩\u200d👩\u200d👧"
ENGLAND = "🏴" + "".join(chr(0xE0000 + ord(char)) for char in "gbeng") + "\U000e007f"
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    st.sampled_from(
        "aé́e\u0301K\u212a\u200b\u200c\u200d\u202e\ufeff\u00ad\x1b[0m\r\n\u2028\U000e0041🏴\U000e007f\u115f각\u1100\u1161"
    )
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\u2028d\u0085e", "a\nb\nc\nd\ne"),
        ("cafe\u0301", "café"),
        ("te\u200bxt\ufeff", "text"),
        ("a\u202eb\u2066c", "abc"),
        ("hid\U000e0041\U000e0042den", "hidden"),
        ("\x1b[31mred\x1b[0m\x07\t", "red\t"),
        ("a\u200db", "ab"),
        (FAMILY, FAMILY),
        (ENGLAND, ENGLAND),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("plain ‘quotes’ – and more…", "plain ‘quotes’ – and more…"),
        ("line\ttab\n", "line\ttab\n"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"),
        ("ｆｕｌｌ width", "full  width "),
        ("ﬁne", "fine"),
        ("caf\u00e9", "cafe\u0301"),
        ("a\u00a0b", "a b"),
        ("te\u200bxt", "text"),
        ("Ω", "\u2126"),
    ],
)
def test_texts_that_look_the_same_compare_equal(one: str, other: str) -> None:
    assert comparison_key(one) == comparison_key(other)


def test_different_words_differ() -> None:
    assert comparison_key("resume") != comparison_key("résumé")


def test_nothing_to_see_is_empty() -> None:
    assert comparison_key(" \n\u200b\u2060\ufeff\u202e") == ""


def test_lone_surrogate() -> None:
    assert has_lone_surrogate("a\ud800")
    assert not has_lone_surrogate("a😀")


def test_zalgo() -> None:
    assert has_zalgo("a" + "\u0301" * 17)
    assert not has_zalgo("a" + "\u0301" * 16)
    assert not has_zalgo("נִקּוּד")


@given(texts)
@settings(max_examples=500, deadline=None)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_the_stored_form_compares_like_the_original(text: str) -> None:
    assert comparison_key(normalise(text)) == comparison_key(text)
