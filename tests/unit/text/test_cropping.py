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
