"""Turn pydantic's complaints into one `ConfigError` that names the key and suggests the right one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipeline_lib.errors import ConfigError


class Frozen(BaseModel):
    """Base of every configuration and record class: immutable, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


ModelT = TypeVar("ModelT", bound=BaseModel)


def did_you_mean(word: str, known: list[str]) -> str:
    """Return `; did you mean 'X'?` for the nearest known word, or the empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def validate(model: type[ModelT], values: Mapping[str, Any], *, where: str) -> ModelT:
    """Validate values against a model.

    Args:
        model: The pydantic class.
        values: Plain values, e.g. out of YAML.
        where: What the values are or came from, for the message.

    Raises:
        ConfigError: With every bad key, its value and, for an unknown key, the nearest known one.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        complaints = [_complaint(model, detail) for detail in error.errors()]
        raise ConfigError(
            f"{where}: " + "; ".join(complaints),
            next_step="correct the keys named above; `prefline show-config CONFIG` prints all keys and values",
        ) from None


def _complaint(model: type[BaseModel], detail: ErrorDetails) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        siblings = _fields_at(model, detail["loc"][:-1])
        return f"unknown key {key!r}{did_you_mean(str(detail['loc'][-1]), siblings)}"
    given = repr(detail["input"])
    shown = given if len(given) <= 80 else given[:77] + "..."
    if detail["type"] == "value_error":
        return f"{key}: {detail['msg'].removeprefix('Value error, ')}" if key else detail["msg"]
    return f"{key or 'value'} = {shown}: {detail['msg']}"


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model that a path of keys leads to."""
    for part in path:
        if not isinstance(part, str) or part not in model.model_fields:
            continue
        nested = _model_in(model.model_fields[part].annotation)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
