"""Docstrings become sentences; the pydoc source gives good questions, the same each time."""

from __future__ import annotations

import statistics

import pytest

from pipeline_lib.data.documentation import first_paragraph
from pipeline_lib.data.place import LocalPlaces
from pipeline_lib.data.refusal import BadRowError
from pipeline_lib.data.sources import SOURCES
from pipeline_lib.data.sources.pydoc import Pydoc
from pipeline_lib.errors import ConfigError
from pipeline_lib.schema import Record, Rejection


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the smaller of two\nnumbers.\n\nMore.", "Return the smaller of two numbers."),
        ("f(x) -> int\n\nReturn the square of x.", "Return the square of x."),
        ("acos(x) -> float: Return the arc cosine of x", "Return the arc cosine of x."),
        (
            "range(stop) -> range object\nrange(a, b) -> range object\n\nReturn an object of numbers.",
            "Return an object of numbers.",
        ),
        ("f(a, b=(1, 2))\nreturns the sum of both", "Returns the sum of both."),
        ("Use ``x`` and :func:`~os.path.join` with *args* now.", "Use `x` and `os.path.join` with args now."),
        ("Make a list of things.\n>>> f()\n1", "Make a list of things."),
        ("Do a thing well. The options are:\n\n  a  b", "Do a thing well."),
        ("Create a temporary file. Arguments:\n'prefix' -- as for mkstemp.", "Create a temporary file."),
        ("Find n!.\n\nRaise an error if x is negative.", "Find n!. Raise an error if x is negative."),
        ("Open a file, e.g. One of yours. And " + "word " * 100, "Open a file, e.g. One of yours."),
    ],
)  # fmt: skip
def test_first_paragraph(docstring: str, expected: str) -> None:
    assert first_paragraph(docstring, min_words=4, max_words=20) == expected


@pytest.mark.parametrize(
    ("docstring", "code"),
    [
        ("", "E_NO_SENTENCE"),
        ("Slice(expr? lower, expr? upper)", "E_NO_SENTENCE"),
        ("expr_context = Load | Store | Del", "E_NO_SENTENCE"),
        ("mod = a(b*c) == [d] {e}", "E_NO_SENTENCE"),
        ("The options are these four:", "E_NO_SENTENCE"),
        ("Broken pipe.", "E_SHORT_DOC"),
        ("word " * 200, "E_LONG_DOC"),
        ("Initialize self.  See help(type(self)) for accurate signature.", "E_MACHINE_TALK"),
        ("Deprecated, use the other function instead.", "E_MACHINE_TALK"),
    ],
)
def test_what_is_no_explanation_is_refused(docstring: str, code: str) -> None:
    with pytest.raises(BadRowError) as caught:
        first_paragraph(docstring, min_words=4, max_words=20)
    assert caught.value.code == code


@pytest.fixture(scope="module")
def rows() -> list[Record | Rejection]:
    return list(Pydoc().rows(LocalPlaces(), lambda _: None))


def test_the_demo_has_enough_good_rows(rows: list[Record | Rejection]) -> None:
    comparisons = [row for row in rows if isinstance(row, Record) and row.kind == "comparison"]
    demonstrations = [row for row in rows if isinstance(row, Record) and row.kind == "demonstration"]
    assert len(comparisons) >= 1000
    assert len(demonstrations) >= 3 * len(comparisons)
    lengths = [len(row.responses[0].content.split()) for row in comparisons]
    assert min(lengths) >= 4
    assert max(lengths) <= 80
    assert statistics.median(lengths) >= 8
    assert len({row.responses[0].content for row in comparisons}) == len(comparisons)
    for row in comparisons:
        text = row.responses[0].content
        assert ">>>" not in text
        assert "\n" not in text
        assert text[-1] in ".!?\")'"


def test_known_functions_are_asked_about(rows: list[Record | Rejection]) -> None:
    by_place = {row.origin.place: row for row in rows if isinstance(row, Record) and row.kind == "comparison"}
    row = by_place["shutil.copytree"]
    assert "`shutil.copytree`" in row.messages[0].content
    assert row.responses[0].content == "Recursively copy a directory tree and return the destination directory."
    assert row.responses[0].author.kind == row.responses[1].author.kind == "documentation"
    assert row.responses[1].author.name.startswith("shutil.")
    assert row.responses[1].author.name != "shutil.copytree"
    assert row.origin.license == "PSF-2.0"
    assert "posixpath.join" not in by_place
    assert "os.path.join" in by_place


def test_a_wrong_answer_is_right_only_in_its_own_group(rows: list[Record | Rejection]) -> None:
    group_by_answer = {row.responses[0].content: row.group for row in rows if isinstance(row, Record)}
    for row in rows:
        if isinstance(row, Record) and row.kind == "comparison":
            assert group_by_answer[row.responses[1].content] == row.group


def test_phrasings_differ_and_share_the_group(rows: list[Record | Rejection]) -> None:
    asked = [row for row in rows if isinstance(row, Record) and row.origin.place == "json.dumps"]
    questions = {row.messages[0].content for row in asked if row.kind == "demonstration"}
    assert len(questions) == 3
    assert len({row.group for row in asked}) == 1
    templates = {
        row.messages[0].content.replace(row.origin.place.removeprefix("builtins."), "X")
        for row in rows
        if isinstance(row, Record)
    }
    assert len(templates) >= 12


def test_two_walks_are_equal(rows: list[Record | Rejection]) -> None:
    assert list(Pydoc().rows(LocalPlaces(), lambda _: None)) == rows


def test_max_items_chooses_across_modules_and_is_nested() -> None:
    def places(count: int) -> set[str]:
        found = Pydoc(max_items=count, modules=("math", "shutil", "json")).rows(LocalPlaces(), lambda _: None)
        return {row.origin.place for row in found if isinstance(row, Record)}

    assert len(places(10)) == 10
    assert len({place.split(".")[0] for place in places(20)}) == 2
    assert places(10) < places(20)


def test_methods_are_taken_on_request() -> None:
    found = Pydoc(modules=("pathlib",), include_methods=True).rows(LocalPlaces(), lambda _: None)
    assert any(row.origin.place == "pathlib.Path.read_text" for row in found if isinstance(row, Record))


@pytest.mark.parametrize("module", ["antigravity", "numpy", "test.support", "tkinter"])
def test_unsafe_modules_are_refused(module: str) -> None:
    with pytest.raises(ConfigError, match="not a module of the standard library"):
        SOURCES.build({"name": "pydoc", "modules": [module]})
