"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
from typing import Any

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def test_no_file_is_longer_than_can_be_read(sources: list[Any]) -> None:
    lengths = {source.name: len(source.text.splitlines()) for source in sources}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_a_screen(sources: list[Any]) -> None:
    too_long = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long[f"{source.place(node)} {node.name}"] = lines
    assert too_long == {}
