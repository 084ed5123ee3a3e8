"""Write the pages of docs/ that follow from the code: the configuration reference and the errors.

`make docs` runs this. tests/architecture/test_docs.py compares the pages with what `pages()` returns,
so a page that was not written anew fails the tests.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline_lib import errors
from pipeline_lib.data.filters import FILTERS
from pipeline_lib.data.sources import SOURCES
from pipeline_lib.errors import PipelineError
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.generation import GENERATORS
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.registry import Table
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.training.rewards import REWARD_SOURCES

ROOT = Path(__file__).resolve().parent.parent
_NOTE = "<!-- Written by `make docs` from the code. Change the code, not this page. -->"
_LONGEST_DEFAULT = 90

_CONFIGURATION_HEAD = f"""\
{_NOTE}
# Configuration

A configuration is one YAML file of differences from the defaults below; it may extend one other file
(`extends: demo.yaml`). The file is YAML 1.2 read strictly: a repeated key is an error, `1e-5` is a
number, `no` is text. A key that does not exist is refused with the nearest one that does.

    prefline show-config demo                           every value, and where it was set
    prefline run demo --set dpo.loss.beta=0.2           one value changed; may be given several times
    prefline run demo --set collect.sources.0.path=x    entries of a list by their number, from 0
    prefline diff demo smoke                            the values in which two configurations differ

A stage's section is part of that stage's key: change it, and that stage and those behind it run again,
no others. `runtime` changes no result and is in no key. The same model is the parameter of the Prefect
flow, so Prefect's page shows it as a form; each artifact keeps the resolved values that made it.
"""

_PLUGINS = (
    ("Sources", "collect.sources", SOURCES),
    ("Filter rules", "filter.rules", FILTERS),
    ("Preference losses", "dpo.loss", PREFERENCE_LOSSES),
    ("Reward losses", "reward.loss", REWARD_LOSSES),
    ("Reward sources", "ppo.rewards.parts", REWARD_SOURCES),
    ("Generators", "ppo.generator", GENERATORS),
    ("Gate metrics", "gate.policy.rules[].metric", GATE_METRICS),
)

_ERRORS_HEAD = f"""\
{_NOTE}
# Errors and exit codes

Whatever ends a run says two lines: what was wrong and where, and what to do next. The process ends
with the code below; `--debug` adds the stack trace. Nothing is left half-written: a result is
committed as a whole or not at all, so the same command may always be run again.

"Retried" says whether the tasks of the flow try such an error twice more by themselves: those that may be gone
with nothing changed.

| exit code | name | meaning | retried |
|---|---|---|---|
"""

_ERRORS_OF_THE_COMMAND_LINE = {
    0: "| 0 | | The flow completed. A candidate that the gate rejected is a completed flow: read the verdict. | |",
    2: "| 2 | | The command line itself was wrong: no such command or option. | no |",
}

_ERRORS_TAIL = """
`prefline fsck` ends with 23 where it found damage. An error that is none of these is a defect of the
program: it ends with 1, and `--debug` shows the trace to report.
"""


def pages() -> dict[Path, str]:
    """Return the text of every generated page by its path."""
    return {
        ROOT / "docs" / "configuration.md": configuration_page(),
        ROOT / "docs" / "errors.md": errors_page(),
    }


def configuration_page() -> str:
    """Return the reference of every key of the run's configuration and every plug-in's parameter."""
    parts = [_CONFIGURATION_HEAD, _contents()]
    top = [(name, field) for name, field in RunConfig.model_fields.items() if _model_in(field.annotation) is None]
    parts.append(
        f"## Top level\n\n{_doc(RunConfig)}\n\n" + _table(_row(name, field, RunConfig()) for name, field in top)
    )
    for name, field in RunConfig.model_fields.items():
        section = _model_in(field.annotation)
        if get_origin(field.annotation) is dict:
            parts.append(f"## {name}\n\n{field.description}\n")
            parts += [_variant_part(variant, name) for variant in _models_in(field.annotation)]
        elif section is not None:
            body = _table(_rows(section, f"{name}.", getattr(RunConfig(), name)))
            parts.append(f"## {name}\n\n{field.description}\n\n{body}")
    parts += [_variants_part(key, variants) for key, variants in sorted(_VARIANTS.items())]
    parts += [_plugin_part(title, place, table) for title, place, table in _PLUGINS]
    return "\n".join(parts)


def _variant_part(variant: type[BaseModel], key: str) -> str:
    """Return the part of one method of candidates; those that have a section of their own are not repeated."""
    if "method" not in variant.model_fields:
        return f"The keys of each are those of [reward](#reward): {_doc(variant)}\n"
    method = variant.model_fields["method"].default
    own = {"preference": "dpo", "ppo": "ppo"}.get(method)
    title = f"### {key}.NAME with method: {method}\n\n{_doc(variant)}\n\n"
    if own is not None:
        return f"{title}The keys are those of [{own}](#{own}).\n"
    return title + _table(_rows(variant, "", None))


def errors_page() -> str:
    """Return the table of every error class, by exit code."""
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, PipelineError)]
    lines = list(_ERRORS_OF_THE_COMMAND_LINE.items())
    for cls in classes:
        meaning = "A defect of the program." if cls is PipelineError else _doc(cls)
        is_retried = "yes" if cls.is_transient else "no"
        lines.append((cls.exit_code, f"| {cls.exit_code} | `{cls.code}` | {_cell(meaning)} | {is_retried} |"))
    return _ERRORS_HEAD + "\n".join(line for _, line in sorted(lines)) + "\n" + _ERRORS_TAIL


def _variants_part(key: str, variants: list[type[BaseModel]]) -> str:
    """Return the part of a key that takes one of several forms, told apart by their `name`."""
    parts = [f"## {key}: the forms\n\nWherever a key ends in `.{key}`: `{{name: ..., parameter: value}}`.\n"]
    for variant in variants:
        parts.append(f"### {key} {variant.model_fields['name'].default}\n\n{_doc(variant)}\n")
        rows = [row for row in _rows(variant, "", None) if not row.startswith("| `name` |")]
        parts.append(_table(rows) if rows else "No parameters.\n")
    return "\n".join(parts)


def _contents() -> str:
    sections = [name for name, field in RunConfig.model_fields.items() if _model_in(field.annotation) is not None]
    titles = [*sections, *(title for title, _, _ in _PLUGINS)]
    return "Sections: " + " · ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in titles) + "\n"


def _plugin_part(title: str, place: str, table: Table) -> str:
    parts = [f"## {title}\n\nUsed in `{place}` as `{{name: ..., parameter: value}}`.\n"]
    for name in table:
        plugin = table[name]
        parts.append(f"### {name}\n\n{_doc(plugin)}\n")
        rows = list(_rows(plugin, "", None))
        parts.append(_table(rows) if rows else "No parameters.\n")
    return "\n".join(parts)


def _rows(model: type[BaseModel], prefix: str, defaults: BaseModel | None) -> Iterator[str]:
    """Yield a line of the table for each key, nested ones by their dotted names."""
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        variants = _models_in(field.annotation)
        if len(variants) > 1:
            _VARIANTS[name] = variants
        if nested is None or len(variants) > 1:
            yield _row(prefix + name, field, defaults)
            continue
        is_list = get_origin(field.annotation) is tuple
        inner = None if is_list else _default_of(name, field, defaults)
        is_read_first = bool(field.metadata)  # e.g. a name that stands for the section
        if is_list or is_read_first or _is_optional(field) or not isinstance(inner, BaseModel):
            yield _row(prefix + name, field, defaults)
        yield from _rows(
            nested, f"{prefix}{name}{'[]' if is_list else ''}.", inner if isinstance(inner, BaseModel) else None
        )


def _row(key: str, field: FieldInfo, defaults: BaseModel | None) -> str:
    name = key.rpartition(".")[2]
    default = _default_of(name, field, defaults)
    cells = [
        f"`{key}`", _type_in_words(field.annotation), _shown(default, is_required=default is _REQUIRED),
        _bounds(field), _cell(field.description or ""),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


_VARIANTS: dict[str, list[type[BaseModel]]] = {}
"""Keys that take one of several forms, filled while the sections are written."""
_REQUIRED = object()


def _default_of(name: str, field: FieldInfo, defaults: BaseModel | None) -> Any:
    if defaults is not None:
        return getattr(defaults, name)
    return _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _shown(value: Any, *, is_required: bool) -> str:
    if is_required:
        return "required"
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple) and any(isinstance(entry, BaseModel) for entry in value):
        return "see below"
    if isinstance(value, tuple) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
        return _cell("all of: " + ", ".join(f"`{entry['name']}`" for entry in value))
    text = json.dumps(value, ensure_ascii=False)
    kind = {str: "a text", dict: "a mapping"}.get(type(value), "a list")
    return f"`{_cell(text)}`" if len(text) <= _LONGEST_DEFAULT else f"{kind}, see the code"


def _bounds(field: FieldInfo) -> str:
    words = []
    for entry in field.metadata:
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            bound = getattr(entry, attribute, None)
            if bound is not None:
                words.append(f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound}")
        if getattr(entry, "min_length", None) is not None:
            words.append(f"at least {entry.min_length}")
        if getattr(entry, "pattern", None) is not None:
            words.append(f"`{_cell(entry.pattern)}`")
    return ", ".join(words)


def _type_in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    variants = _models_in(annotation)
    if len(variants) > 1 and origin is not dict:
        return " or ".join(f"`{variant.model_fields['name'].default}`" for variant in variants)
    if origin is Annotated:
        return _type_in_words(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_in_words(part) for part in arguments)
    if origin is tuple:
        if Ellipsis in arguments:
            return f"list of {_type_in_words(arguments[0])}"
        return "[" + ", ".join(_type_in_words(part) for part in arguments) + "]"
    if origin is dict:
        return "plug-in" if arguments == (str, Any) else "mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model_in(part)
        if found is not None:
            return found
    return None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _is_optional(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _doc(cls: type) -> str:
    """Return the prose of a class's docstring, each paragraph on one line."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[0].strip()
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 110) for part in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(rows: Iterator[str] | list[str]) -> str:
    return "| key | type | default | bounds | meaning |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Write every generated page."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
