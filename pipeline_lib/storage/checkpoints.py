"""Checkpoints of a training stage: committed like artifacts, the newest valid one found again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline_lib.errors import IntegrityError, StorageError
from pipeline_lib.storage.store import ArtifactStore, FileEntry, Held
from pipeline_lib.validation import Frozen

logger = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints kept: the newest, and the one before it should the newest be damaged."""


class CheckpointManifest(Frozen):
    """What a checkpoint holds."""

    step: int
    files: dict[str, FileEntry]
    note: dict[str, Any] = Field(default_factory=dict)


class Checkpoints:
    """The checkpoints under one stage key."""

    def __init__(self, store: ArtifactStore, stage_key: str, *, lease: Held | None = None) -> None:
        """Name the stage; with its lease, every save is fenced by it."""
        self.store, self.stage_key, self.lease = store, stage_key, lease

    def save(self, step: int, directory: Path, note: Mapping[str, Any]) -> None:
        """Commit a directory as the checkpoint of a step: files first, manifest last.

        Raises:
            HeldError: The lease was lost; the checkpoint is not visible.
        """
        files = self.store.upload_files(directory, at=lambda sha256: self._file(step, sha256))
        if self.lease is not None:
            self.lease.assert_held()
        manifest = CheckpointManifest(step=step, files=files, note=dict(note))
        self.store.objects.put(self._path(step), manifest.model_dump_json().encode())
        # One of a later step was refused when this run resumed, or it would not be at this step.
        self._forget(all_but=sorted(each for each in self._steps() if each <= step)[-KEPT:])

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and note of the newest checkpoint whose files are all there and right."""
        for step in sorted(self._steps(), reverse=True):
            manifest = self._manifest(step)
            damage = "its manifest is unreadable" if manifest is None else self._damage(manifest)
            if manifest is not None and damage is None:
                return step, manifest.note
            logger.warning("checkpoint %d of stage %s is refused: %s", step, self.stage_key[:12], damage)
        return None

    def fetch(self, step: int, directory: Path) -> Path:
        """Write a checkpoint's verified files into a directory.

        Raises:
            IntegrityError: There is no such checkpoint, or a file of it is damaged.
            DiskFullError: The disk has no room for it.
        """
        manifest = self._manifest(step)
        if manifest is None:
            raise IntegrityError(f"there is no checkpoint of step {step}", next_step="run the same command again")
        directory.mkdir(parents=True, exist_ok=True)
        for name, entry in manifest.files.items():
            self.store.objects.download(
                self._file(step, entry.sha256), directory / name,
                sha256=entry.sha256, size_bytes=entry.size_bytes, label=f"{name} of checkpoint {step}",
            )  # fmt: skip
        return directory

    def clear(self) -> None:
        """Delete all checkpoints, once the stage's result is committed."""
        self._forget(all_but=[])

    def _damage(self, manifest: CheckpointManifest) -> str | None:
        for name, entry in manifest.files.items():
            try:
                found = self.store.objects.sha256_of(self._file(manifest.step, entry.sha256))
            except (IntegrityError, StorageError) as error:
                list(self._steps())  # raises where it is the server that is gone, not the file
                return f"{name} cannot be read ({error.cause})"
            if found != entry.sha256:
                return f"{name} is {'missing' if found is None else 'damaged'}"
        return None

    def _path(self, step: int) -> str:
        return f"checkpoints/{self.stage_key}/{step:08d}.json"

    def _file(self, step: int, sha256: str) -> str:
        # Not among the shared blobs: deleting a checkpoint must never take another's file along.
        return f"checkpoints/{self.stage_key}/{step:08d}/{sha256}"

    def _steps(self) -> Iterator[int]:
        for listed in self.store.objects.list(f"checkpoints/{self.stage_key}/"):
            name = listed.path.rsplit("/", 1)[1].removesuffix(".json")
            if listed.path.endswith(".json") and name.isdigit():
                yield int(name)

    def _manifest(self, step: int) -> CheckpointManifest | None:
        found = self.store.objects.get(self._path(step))
        if found is None:
            return None
        try:
            return CheckpointManifest.model_validate_json(found.content)
        except ValidationError:
            return None

    def _forget(self, *, all_but: list[int]) -> None:
        """Delete every checkpoint but the kept ones: its manifest first, then its files."""
        kept = {f"{step:08d}" for step in all_but}
        listed = [each.path for each in self.store.objects.list(f"checkpoints/{self.stage_key}/")]
        for path in sorted(listed, key=lambda path: not path.endswith(".json")):
            if path.split("/")[2].removesuffix(".json") not in kept:
                self.store.objects.delete(path)
