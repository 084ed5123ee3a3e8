"""`prefline explain`: from a model version, or any artifact, back to where it came from."""

from __future__ import annotations

from pathlib import Path

from pipeline_lib.errors import TrackingError
from pipeline_lib.stages.lineage import artifact_named, describe
from pipeline_lib.tracking import ARTIFACT_TAG, ModelRegistry
from tasks.services import open_store, tracking_settings

_SCHEME = "models:/"


def explain(target: str, *, home: Path, num_rows: int) -> str:
    """Return the lineage of `models:/NAME@alias`, `models:/NAME/VERSION`, or an artifact's id.

    Raises:
        ConfigError: The target is of no known form, or names no artifact.
        TrackingError: The registry has no such version.
    """
    with open_store(home) as (storage, store):
        if not target.startswith(_SCHEME):
            return describe(store, artifact_named(store, target), num_rows=num_rows)
        registry = ModelRegistry(tracking_settings(home, storage))
        name, version, tags = _version(registry, target)
        lines = [f"{name} version {version}"]
        lines += [f"    tag       {key} = {value}" for key, value in sorted(tags.items())]
        model = artifact_named(store, tags[ARTIFACT_TAG])
        verdict_id = tags.get("prefline.verdict_id")
        shown = f"verdict/{verdict_id[:12]} (prefline explain {verdict_id})" if verdict_id else "none"
        verdict = f"\nEvidence: {shown}\n"
        return "\n".join([*lines, "", describe(store, model, num_rows=num_rows)]) + verdict


def _version(registry: ModelRegistry, target: str) -> tuple[str, str, dict[str, str]]:
    name, at, alias = target.removeprefix(_SCHEME).partition("@")
    if at:
        found = registry.version_of_alias(name, alias)
        if found is None:
            raise TrackingError(
                f"the registry has no {name}@{alias}",
                next_step="run the pipeline, or name a version: models:/NAME/1",
            )
        return name, *found
    name, slash, version = target.removeprefix(_SCHEME).partition("/")
    tags = dict(registry.versions(name)).get(version) if slash else None
    if tags is None or ARTIFACT_TAG not in tags:
        raise TrackingError(
            f"the registry has no version of Prefline at {target}",
            next_step="write models:/NAME@alias or models:/NAME/1",
        )
    return name, version, tags
