"""docs/rows.md: every layout stands there once, with a row that is recognised and read as what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline_lib.data.fields import _ALIASES
from pipeline_lib.data.layouts import LAYOUTS, detect

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "rows.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^\| `(\w+)` \| `(\{.*\})` \|", PAGE, re.MULTILINE))


def test_every_layout_has_a_row() -> None:
    assert EXAMPLES.keys() == LAYOUTS.keys()
    assert "one of ten layouts" in PAGE
    assert len(LAYOUTS) == 10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_recognised_and_read(layout: str) -> None:
    row = json.loads(EXAMPLES[layout])
    assert detect(row) == layout
    mapped = LAYOUTS[layout](row)
    assert mapped.prompt[-1].content in ("Why?", "Translate.\n\nja")
    assert mapped.responses[:1] in ((), ("Because.",), ("yes",))
    expected = {"prompt": 0, "prompt_completion": 1, "messages": 1, "alpaca": 1, "rated": 1, "ranked": 3}
    assert len(mapped.responses) == expected.get(layout, 2)
    assert mapped.ranks == {2: (1, 2), 3: (1, 2, 2)}.get(len(mapped.responses), ())
    assert mapped.desirable is (True if layout == "rated" else None)


def test_other_names_are_those_of_the_code() -> None:
    for field in ("prompt", "response", "messages", "responses", "ranks", "scores", "chosen_score", "weight", "tags"):
        for name in _ALIASES[field]:
            assert f"`{name}`" in PAGE, (field, name)
