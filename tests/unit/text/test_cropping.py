"""Prompts that begin and end with whole sentences."""

from __future__ import annotations

import pytest

from pipeline_lib.text.cropping import cropped


@pytest.mark.parametrize(
    ("text", "start", "end", "expected"),
    [
        ("of it. He went. Then he", ".", ".", "He went."),
        ("of it. He went. Then he", None, ".", "of it. He went."),
        ("of it. He went. Then he", ".", None, "He went. Then he"),
        ("of it. He went. Then he", None, None, "of it. He went. Then he"),
        ("no sentence", ".", ".", None),
        ("only. one mark", ".", ".", None),
        ("ends here.", ".", None, None),
        ("a END b END c", None, " END", "a END b END"),
    ],
)
def test_a_text_is_cut_to_whole_sentences(text: str, start: str | None, end: str | None, expected: str | None) -> None:
    assert cropped(text, start_text=start, end_text=end) == expected


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(99, "He went. She came. It rained."), (28, "He went. She came."), (18, "He went. She came."), (8, "He went."),
     (7, None)],
)  # fmt: skip
def test_as_many_sentences_as_fit(longest: int, expected: str | None) -> None:
    text = "of it. He went. She came. It rained. And"
    assert cropped(text, start_text=".", end_text=".", fits=lambda part: len(part) <= longest) == expected


def test_without_an_end_mark_nothing_is_left_out() -> None:
    assert cropped("of it. He went", start_text=".", end_text=None, fits=lambda _: False) == "He went"
