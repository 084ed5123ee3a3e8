"""Calls that are not made here, found in the syntax trees: each would undo a promise of the design."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Reading any of these runs code out of a file, or hides an error.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "imp", "telnetlib"}
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "torch.load": "reads pickles: use safetensors",
    "torch.save": "writes pickles: use safetensors",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "yaml.load": "makes objects: use pipeline_lib.config.read_yaml",
    "yaml.unsafe_load": "makes objects: use pipeline_lib.config.read_yaml",
    "tempfile.mktemp": "another process may take the name",
}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a name or an attribute of a name, else the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def imported(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield every imported module with its place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def is_true(call: ast.Call, keyword: str) -> bool:
    """Tell whether a call passes a keyword with anything but a plain False."""
    return any(
        entry.arg == keyword and not (isinstance(entry.value, ast.Constant) and entry.value.value is False)
        for entry in call.keywords
    )


def forbidden_in(tree: ast.AST, *, is_library: bool) -> Iterator[tuple[ast.AST, str]]:
    """Yield each forbidden construct with what is wrong about it."""
    for node, module in imported(tree):
        if module.partition(".")[0] in FORBIDDEN_MODULES or module in FORBIDDEN_CALLS:
            yield node, f"imports {module}"
    for call in calls(tree):
        name = dotted(call.func)
        if name in FORBIDDEN_CALLS:
            yield call, f"{name} {FORBIDDEN_CALLS[name]}"
        if is_true(call, "shell"):
            yield call, "shell=True"
        if is_true(call, "trust_remote_code"):
            yield call, "trust_remote_code=True runs code out of a model's folder"
        if is_library and name == "print":
            yield call, "print: the library logs, the command line prints"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node, "a bare except"


def test_nothing_forbidden_in_the_product(sources: list[Any]) -> None:
    found = [
        f"{source.place(node)}: {why}"
        for source in sources
        for node, why in forbidden_in(source.tree, is_library=source.package == "pipeline_lib")
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load('x')",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=chosen)",
        "yaml.load(text)",
        "print('hello')",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_each_is_noticed(text: str) -> None:
    assert list(forbidden_in(ast.parse(text), is_library=True))


@pytest.mark.parametrize("text", ["subprocess.run(['ls'], shell=False)", "model.eval()", "json.load(f)", "import json"])
def test_what_looks_alike_is_allowed(text: str) -> None:
    assert not list(forbidden_in(ast.parse(text), is_library=True))


def test_no_test_sleeps_or_hides_a_failure(root: Path) -> None:
    found = []
    for path in sorted((root / "tests").rglob("*.py")):
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            if dotted(call.func) in ("time.sleep", "asyncio.sleep", "sleep"):
                found.append(f"{path.relative_to(root)}:{call.lineno}")
    assert found == []


def test_nothing_is_left_to_do(root: Path) -> None:
    mark = re.compile(r"(#|<!--|//|^|\"\"\").{0,20}\b(TO" + "DO|FIX" + r"ME)\b")
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in texts(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if mark.search(line)
    ]
    assert found == []


def texts(root: Path) -> list[Path]:
    """Return the texts that people read: code, configuration and pages."""
    folders = ("pipeline_lib", "flows", "tasks", "tests", "configs", "docs", "infra", "benchmarks")
    suffixes = {".py", ".md", ".yaml", ".json", ".toml", ".html", ".jinja"}
    found = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in suffixes]
    return sorted(path for path in [*found, *root.glob("*.md")] if "__pycache__" not in path.parts)
