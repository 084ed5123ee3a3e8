"""What an artifact is: its manifest, by whose content part it is named."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field, field_validator

from pipeline_lib.errors import IntegrityError
from pipeline_lib.hashing import sha256_json
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.validation import Frozen

_PACKAGES = ("prefline", "torch", "transformers", "peft", "datasets", "mlflow", "prefect", "numpy")


class FileEntry(Frozen):
    """One file of an artifact."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Manifest(Frozen):
    """What an artifact is and how it came to be. The id covers the fields up to `inputs`."""

    kind: str
    files: dict[str, FileEntry]
    """By relative POSIX path."""
    stage: str
    stage_version: int
    config: dict[str, Any]
    inputs: dict[str, ArtifactRef]
    created_at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Figures of the result; None is one that was not finite."""
    measurements: dict[str, float] = Field(default_factory=dict)
    """What differs from run to run: `wall_s`, `peak_rss_bytes`."""
    host: dict[str, str] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        # A manifest is input: none of its paths may lead out of the directory it is fetched into.
        for path in files:
            check_relative(path)
        return files

    @property
    def id(self) -> str:
        """Sha256 of the canonical content part."""
        content = {"kind", "files", "stage", "stage_version", "config", "inputs"}
        return sha256_json(self.model_dump(mode="json", include=content))

    @property
    def ref(self) -> ArtifactRef:
        """The artifact's reference."""
        return ArtifactRef(kind=self.kind, id=self.id)


def check_relative(path: str) -> None:
    """Check that a path stays inside the directory it is taken relative to.

    Raises:
        ValueError: It is absolute, climbs, or is not in its plain form.
    """
    plain = PurePosixPath(path)
    if not path or plain.is_absolute() or ".." in plain.parts or plain.as_posix() != path or "\0" in path:
        raise ValueError(f"{path!r} is no plain relative path")


def entry_of(files: Mapping[str, FileEntry], ref: ArtifactRef, path: str) -> FileEntry:
    """Return the entry of a file.

    Raises:
        IntegrityError: The artifact has no such file.
    """
    if path not in files:
        raise IntegrityError(
            f"artifact {ref} has no file {path!r}", next_step="its stage made another version's files: run it again"
        )
    return files[path]


def installed_versions() -> dict[str, str]:
    """Return the versions of the installed packages that can change a result."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
