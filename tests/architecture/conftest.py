"""The source files that the architecture tests look at."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Source:
    """One Python file of the product."""

    path: Path

    @property
    def name(self) -> str:
        """The file as it is shown: from the repository's root."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        """The dotted name under which it is imported."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """`pipeline_lib`, `flows` or `tasks`."""
        return self.name.partition("/")[0]

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    def place(self, node: ast.AST) -> str:
        """Where a node is, as `file:line`."""
        return f"{self.name}:{getattr(node, 'lineno', 1)}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every Python file of the three packages."""
    found = [
        Source(path)
        for package in ("pipeline_lib", "flows", "tasks")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    assert len(found) > 50, "the packages were not found"
    return found
