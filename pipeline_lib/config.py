"""Configuration files: load, override, say where each value came from, compare; and the stage key.

A file holds differences from the defaults only, may extend one other file, and is YAML 1.2 read
strictly: duplicate keys are refused, `1e-5` is a number and `no` is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline_lib.errors import ConfigError
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.validation import did_you_mean, validate

ModelT = TypeVar("ModelT", bound=BaseModel)

PRESETS = Path(__file__).resolve().parent.parent / "configs"
"""Folder of the presets that come with the repository."""

_MAX_EXTENDS = 5


@dataclass(frozen=True)
class Loaded(Generic[ModelT]):
    """A validated configuration and where each of its values was set."""

    value: ModelT
    origins: dict[str, str]
    """`file` or `--set` by dotted key, for every key that is not a default."""


def find_config(name: str) -> Path:
    """Return the path of a configuration: a file, or a preset by its bare name.

    Raises:
        ConfigError: Neither exists; the nearest preset is suggested.
    """
    path = Path(name)
    if path.is_file():
        return path
    preset = PRESETS / f"{name}.yaml"
    if preset.is_file():
        return preset
    files = [*PRESETS.glob("*.yaml"), *PRESETS.glob("methods/*.yaml")]
    known = sorted(file.relative_to(PRESETS).with_suffix("").as_posix() for file in files)
    raise ConfigError(
        f"no configuration {name!r}{did_you_mean(name, known)}",
        next_step=f"give a YAML file or a preset: {', '.join(known)}",
    )


def load(path: Path, model: type[ModelT], overrides: list[str] | None = None) -> Loaded[ModelT]:
    """Load a configuration file, apply `key.path=value` overrides, and validate.

    Args:
        path: The YAML file.
        model: The class to validate against.
        overrides: Items as given to `--set`; list positions are numbers (`collect.sources.0.path=x`).

    Raises:
        ConfigError: The file, an override, a key or a value is wrong; says which and where.
    """
    tree, origins = _read_extended(path, depth=0)
    for item in overrides or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"--set {item!r} is not of the form key.path=value", next_step="write --set dpo.loss.beta=0.2"
            )
        _put(tree, key.split("."), _parse(text, where=f"--set {key}"), where=f"--set {key}")
        origins[key] = "--set"
    return Loaded(validate(model, tree, where=str(path)), origins)


def changed(config: ModelT, changes: Mapping[str, Any], *, where: str) -> ModelT:
    """Return a configuration with some values replaced.

    Args:
        config: A valid configuration.
        changes: New values by dotted key, as `--set` has them.
        where: Where the changes are from, for messages.

    Raises:
        ConfigError: A key is not there, or a value does not fit.
    """
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        _put(tree, key.split("."), value, where=f"{where}: {key}")
    return validate(type(config), tree, where=where)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file as a mapping.

    Raises:
        ConfigError: It cannot be read, is not YAML, repeats a key, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", next_step="give a readable UTF-8 YAML file") from error
    value = _parse(text, where=str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the top level is no mapping", next_step="write `key: value` lines")
    return value


def _parse(text: str, *, where: str) -> Any:
    if text == "":
        return ""
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        reason = str(getattr(error, "problem", None) or error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{line}: {reason}", next_step="correct the YAML at this place") from error
    return value


def _read_extended(path: Path, *, depth: int) -> tuple[dict[str, Any], dict[str, str]]:
    if depth > _MAX_EXTENDS:
        raise ConfigError(f"{path}: `extends` goes round in a circle", next_step="extend one other file, once")
    own = read_yaml(path)
    base_name = own.pop("extends", None)
    origins = {key: str(path) for key in flatten(own)}
    if base_name is None:
        return own, origins
    base_path = path.parent / str(base_name)
    if not base_path.is_file():
        raise ConfigError(
            f"{path}: extends {base_name!r}, which does not exist", next_step="give a path beside this file"
        )
    base, base_origins = _read_extended(base_path, depth=depth + 1)
    # The file itself is no plug-in: its own name is one more key to change.
    return _merged_keys(base, own), base_origins | origins


def _merge(base: Any, own: Any) -> Any:
    if isinstance(base, dict) and isinstance(own, dict):
        # A plug-in of another name starts anew: the old one's parameters mean nothing to it.
        if "name" in own and own["name"] != base.get("name", own["name"]):
            return own
        return _merged_keys(base, own)
    return own


def _merged_keys(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return base | {key: _merge(base[key], value) if key in base else value for key, value in own.items()}


def _put(tree: dict[str, Any], keys: list[str], value: Any, *, where: str) -> None:
    place: Any = tree
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ConfigError(
                    f"{where}: the list has {len(place)} entries, there is no {key!r}",
                    next_step="use a position from 0, or set the entry in a file first",
                )
            index = int(key)
            if is_last:
                place[index] = value
            place = place[index]
        elif isinstance(place, dict):
            if is_last:
                place[key] = value
            elif place.get(key) is None:
                place[key] = {}
            place = place[key]
        else:
            raise ConfigError(
                f"{where}: {'.'.join(keys[:depth])!r} is a value, it has no key {key!r}",
                next_step="`prefline show-config CONFIG` prints all keys",
            )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys; lists and scalars are leaves."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(first: BaseModel, second: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Return every dotted key whose value differs, with both values."""
    left, right = flatten(first.model_dump(mode="json")), flatten(second.model_dump(mode="json"))
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


def stage_key(stage: str, version: int, config: BaseModel, inputs: Mapping[str, ArtifactRef]) -> str:
    """Return the key under which a stage's result is found again.

    It is the sha256 over everything that can change the result: the stage, its version, its whole
    configuration (run-time settings are no part of a stage's configuration) and its inputs.
    """
    return sha256_json(
        {
            "stage": stage,
            "version": version,
            "config": config.model_dump(mode="json"),
            "inputs": {name: ref.id for name, ref in inputs.items()},
        }
    )
