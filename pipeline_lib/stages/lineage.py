"""Lineage in words: from an artifact back to the sources, rows and configuration it came from."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline_lib.config import flatten
from pipeline_lib.errors import ConfigError
from pipeline_lib.schema import ArtifactRef, Record, Split
from pipeline_lib.storage.store import ArtifactStore, Manifest

_SHOWN_VALUE_CHARACTERS = 90
_DATASET_FILES = {split: f"{split.value}.jsonl" for split in Split}


def walk(store: ArtifactStore, root: ArtifactRef) -> Iterator[tuple[ArtifactRef, Manifest]]:
    """Yield an artifact and everything it was made from, each once, results before inputs."""
    seen: set[str] = set()
    queue = [root]
    while queue:
        ref = queue.pop(0)
        if ref.id in seen:
            continue
        seen.add(ref.id)
        manifest = store.manifest(ref)
        yield ref, manifest
        queue += manifest.inputs.values()


def artifact_named(store: ArtifactStore, text: str) -> ArtifactRef:
    """Find an artifact by its id, the beginning of it, `kind/sha12`, or the place of its manifest.

    Raises:
        ConfigError: None has that name, or several have.
    """
    start = text.removesuffix("/manifest.json").rpartition("/")[2]
    found = [ref for ref in store.list_artifacts() if ref.id.startswith(start)] if start else []
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} artifacts of the store have an id that begins with {start!r}",
            next_step="give more of the id; `prefline explain models:/NAME@alias` prints the ids of a model's lineage",
        )
    return found[0]


def describe(store: ArtifactStore, root: ArtifactRef, *, num_rows: int) -> str:
    """Return the lineage of an artifact as text.

    Args:
        store: The artifact store.
        root: The artifact.
        num_rows: Training rows to show, with the places they came from.
    """
    lines: list[str] = []
    datasets: list[ArtifactRef] = []
    for ref, manifest in walk(store, root):
        lines += _paragraph(ref, manifest)
        if manifest.kind == "dataset":
            datasets.append(ref)
    if datasets:
        lines += _rows(store, datasets[0], num_rows)
    return "\n".join(lines)


def _paragraph(ref: ArtifactRef, manifest: Manifest) -> list[str]:
    size_mib = sum(entry.size_bytes for entry in manifest.files.values()) / (1 << 20)
    lines = [
        f"{ref}  made by {manifest.stage} (version {manifest.stage_version}) on {manifest.created_at}, "
        f"{len(manifest.files)} files, {size_mib:.1f} MiB",
        f"    id        {ref.id}",
    ]
    for role, source in manifest.inputs.items():
        lines.append(f"    from      {role}: {source}")
    for key, value in flatten(manifest.config).items():
        text = str(value)
        shown = text if len(text) <= _SHOWN_VALUE_CHARACTERS else text[: _SHOWN_VALUE_CHARACTERS - 1] + "…"
        lines.append(f"    config    {key} = {shown}")
    for name, figure in sorted(manifest.metrics.items()):
        lines.append(f"    figure    {name} = {'–' if figure is None else f'{figure:.6g}'}")
    versions = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    return [*lines, f"    software  {versions}", ""]


def _rows(store: ArtifactStore, dataset: ArtifactRef, num_rows: int) -> list[str]:
    lines = [f"Rows of {dataset}:"]
    for split, name in _DATASET_FILES.items():
        records = [Record.model_validate_json(line) for line in store.read_lines(dataset, name)]
        lines.append(f"  {split.value}: {len(records)} rows")
        for record in records[:num_rows]:
            origin = record.origin
            place = f"{origin.place}:{origin.line}" if origin.line is not None else origin.place
            question = record.messages[-1].content.replace("\n", " ")[:60]
            lines.append(f"    {record.id[:12]}  {origin.source}  {place}  [{origin.license}]  {question}")
    return lines
