"""Plug-in tables: a name, a dotted place, resolved lazily, refused with "did you mean"."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.validation import did_you_mean, validate

PluginSpec = dict[str, Any]
"""How a configuration names a plug-in: `{"name": ..., **parameters}`."""


class Table(Mapping[str, type[BaseModel]]):
    """A hand-written table of plug-ins of one kind.

    Iterating over the names imports nothing; `table[name]` imports the one module asked for.
    A plug-in is a frozen pydantic class whose fields are its parameters.
    """

    def __init__(self, kind: str, places: dict[str, str]) -> None:
        """Take the kind's name for messages and `{name: "package.module:Class"}`."""
        self.kind = kind
        self._places = places

    def __getitem__(self, name: str) -> type[BaseModel]:
        if name not in self._places:
            raise ConfigError(
                f"unknown {self.kind} {name!r}{did_you_mean(name, list(self._places))}",
                next_step=f"use one of: {', '.join(sorted(self._places))}",
            )
        module, _, attribute = self._places[name].partition(":")
        plugin: type[BaseModel] = getattr(importlib.import_module(module), attribute)
        assert issubclass(plugin, BaseModel), f"{self._places[name]} is not a pydantic class"
        return plugin

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def complete(self, spec: Mapping[str, Any]) -> PluginSpec:
        """Check what describes a plug-in and write its defaults out, so that a stage key sees them.

        Raises:
            ConfigError: As `build`.
        """
        plugin: BaseModel = self.build(spec)
        return {"name": spec["name"], **plugin.model_dump(mode="json")}

    def build(self, spec: Mapping[str, Any]) -> Any:
        """Build the plug-in that `{"name": ..., **parameters}` describes.

        Raises:
            ConfigError: The name or a parameter is unknown, or a value is out of bounds.
        """
        if "name" not in spec:
            raise ConfigError(
                f"a {self.kind} needs a name", next_step=f"add `name:` with one of: {', '.join(sorted(self))}"
            )
        name = str(spec["name"])
        parameters = {key: value for key, value in spec.items() if key != "name"}
        return validate(self[name], parameters, where=f"{self.kind} {name!r}")
