"""Turn pydantic's complaints into one `ConfigError` that names the key and suggests the right one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

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

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """What an old key is called now, for the message that refuses it."""


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
    kind, context = detail["type"], detail.get("ctx", {})
    place = _place(model, detail["loc"])
    if kind == "extra_forbidden":
        return _unknown_key(_place(model, detail["loc"][:-1]), str(detail["loc"][-1]))
    if kind == "union_tag_not_found":
        return f"{place.key}.{_unquoted(context)}: missing; it is one of {', '.join(place.members)}"
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        hint = did_you_mean(tag, list(place.members))
        return f"{place.key}.{_unquoted(context)}: unknown {tag!r}{hint or ';'} it is one of {', '.join(place.members)}"
    given = repr(detail["input"])
    shown = given if len(given) <= 80 else given[:77] + "..."
    if kind == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{place.key}: {message}" if place.key else detail["msg"]
    if place.members and kind == "model_attributes_type":
        return f"{place.key} = {shown}: it is a section like {{name: {next(iter(place.members))}}}"
    return f"{place.key or 'value'} = {shown}: {detail['msg']}"


def _unknown_key(place: _Place, word: str) -> str:
    """Refuse a key: with its new name, the nearest known one, or the variants that have it."""
    key = f"{place.key}.{word}" if place.key else word
    model = place.model
    if model is None:
        return f"unknown key {key!r}"
    new_name = getattr(model, "renamed_keys", {}).get(word)
    if new_name is not None:
        return f"unknown key {key!r}; did you mean {new_name}?"
    owners = [name for name, other in place.siblings.items() if word in other.model_fields]
    if owners:
        return f"unknown key {key!r}: {place.tag} has none, only {', '.join(owners)}"
    return f"unknown key {key!r}{did_you_mean(word, list(model.model_fields))}"


def _unquoted(context: Mapping[str, Any]) -> str:
    return str(context["discriminator"]).strip("'")


@dataclass(frozen=True)
class _Place:
    """Where in a model a complaint points: the key as it is written in a file, and what is there."""

    key: str
    model: type[BaseModel] | None
    """The class whose fields are the keys there."""
    members: dict[str, type[BaseModel]]
    """The variants that `name` chooses from there, by their names."""
    tag: str
    """The variant that was chosen to come here."""
    siblings: Mapping[str, type[BaseModel]]
    """The variants that were not."""


def _place(model: type[BaseModel], path: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's path, which holds the names of a union's members besides the keys."""
    keys: list[str] = []
    annotation: Any = model
    tag, siblings = "", dict[str, type[BaseModel]]()
    for part in path:
        annotation = _bare(annotation)
        variants = _variants(annotation)
        tag, siblings = "", {}
        if variants is not None:
            annotation = variants.get(str(part))
            tag, siblings = str(part), {name: other for name, other in variants.items() if name != part}
            continue
        keys.append(str(part))
        annotation = _inside(annotation, part)
    annotation = _bare(annotation)
    key = ".".join(keys).removesuffix(".[key]")
    return _Place(key, annotation if _is_model(annotation) else None, _variants(annotation) or {}, tag, siblings)


def _bare(annotation: Any) -> Any:
    """Take `Annotated` and `| None` off."""
    while True:
        origin, arguments = get_origin(annotation), get_args(annotation)
        others = [part for part in arguments if part is not type(None)]
        if origin is Annotated or (origin in (Union, types.UnionType) and len(others) == 1):
            annotation = others[0]
        else:
            return annotation


def _variants(annotation: Any) -> dict[str, Any] | None:
    """Return a union's models by the labels that pydantic puts into its paths, or None.

    The labels are the values of the key that tells the models apart, else the classes' names.
    """
    if get_origin(annotation) not in (Union, types.UnionType):
        return None
    models = [part for part in map(_bare, get_args(annotation)) if _is_model(part)]
    for key in models[0].model_fields if models else ():
        labels = {label: model for model in models for label in _literals(model, key)}
        if len(labels) == sum(len(_literals(model, key)) or 1 for model in models):
            return labels
    return {model.__name__: model for model in models}


def _literals(model: type[BaseModel], key: str) -> list[str]:
    annotation = model.model_fields[key].annotation if key in model.model_fields else None
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _inside(annotation: Any, part: int | str) -> Any:
    """Return the annotation of a model's field, a mapping's values or a list's entries."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(part))
        return None if field is None else field.annotation
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and Ellipsis not in arguments:
        return arguments[part] if isinstance(part, int) and part < len(arguments) else None
    if get_origin(annotation) in (list, tuple, set, frozenset):
        return arguments[0]
    return arguments[1] if len(arguments) == 2 else None
