"""Every golden number, against the code; and the golden files against the program that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.golden.check import check, load, topics
from tests.golden.check_gate import check_decision
from tests.golden.independent import all_files, content

CASES = [
    pytest.param(case.get("module", golden.module), case, id=f"{topic}: {case['name']}")
    for topic in topics()
    for golden in [load(topic)]
    for case in golden.cases
]


@pytest.mark.parametrize(("module", "case"), CASES)
def test_golden(module: str, case: dict[str, Any]) -> None:
    check(module, case)


@pytest.mark.parametrize("case", load("gate_by_hand").cases, ids=lambda case: str(case["name"]))
def test_golden_decision(case: dict[str, Any]) -> None:
    check_decision(case)


@pytest.mark.parametrize("topic", topics())
def test_every_file_says_where_its_numbers_come_from(topic: str) -> None:
    golden = load(topic)
    assert golden.provenance
    assert golden.cases
    assert all(case["expected"] for case in golden.cases)


@pytest.mark.parametrize("topic", list(all_files()))
def test_files_are_what_the_independent_program_computes(topic: str) -> None:
    assert Path(__file__).with_name(f"{topic}.json").read_text(encoding="utf-8") == content(topic)
