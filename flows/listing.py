"""The text of `prefline list`: the plug-ins of a kind with their parameters."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.stages import STAGES, plugin_tables
from pipeline_lib.validation import did_you_mean


def describe(kind: str) -> str:
    """Return a line for each plug-in of a kind, and one for each of its parameters.

    Raises:
        ConfigError: There is no such kind.
    """
    if kind == "stages":
        return "\n".join(f"{spec.name}  (version {spec.version})" for spec in STAGES.values())
    tables: Mapping[str, Mapping[str, type[BaseModel]]] = plugin_tables()
    if kind not in tables:
        known = [*tables, "stages"]
        raise ConfigError(
            f"no plug-ins of kind {kind!r}{did_you_mean(kind, known)}", next_step=f"use one of: {', '.join(known)}"
        )
    lines: list[str] = []
    for name in sorted(tables[kind]):
        plugin = tables[kind][name]
        lines.append(f"{name}: {(plugin.__doc__ or '').strip().splitlines()[0]}")
        for field_name, field in plugin.model_fields.items():
            default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
            lines.append(f"    {field_name} ({default}): {field.description or ''}")
    return "\n".join(lines)
