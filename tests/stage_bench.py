"""What tests of stages share: events that are remembered, and folders that become artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.contract import StageContext
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.store import ArtifactStore


class Told:
    """Events of a stage that are remembered."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """What it logged."""
        self.texts: list[str] = []
        """What it logged, and what it said of its progress."""
        self.figures: list[tuple[int, dict[str, float]]] = []
        """Every step with its figures, as they came."""

    def progress(self, fraction: float, text: str) -> None:
        self.texts.append(text)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.figures.append((step, dict(values)))

    def log(self, text: str) -> None:
        self.lines.append(text)
        self.texts.append(text)

    def series(self, name: str) -> list[float]:
        """Every value of a figure, in order."""
        return [values[name] for _, values in self.figures if name in values]

    def of_step(self, step: int) -> dict[str, float]:
        """Everything told of a step."""
        return {name: value for at, values in self.figures if at == step for name, value in values.items()}


def commit(store: ArtifactStore, directory: Path, kind: str, **changes: Any) -> ArtifactRef:
    """Make a folder an artifact, of a stage of its kind's name and found by no key unless the test says otherwise."""
    given: dict[str, Any] = {
        "stage": kind, "stage_version": 1, "config": {}, "inputs": {}, "metrics": {}, "measurements": {},
        "stage_key": None,
    }  # fmt: skip
    return store.commit(directory, kind=kind, **(given | changes))


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """Write files by their paths in a folder."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def context_in(home: Path, store: ArtifactStore, *, told: Told | None = None, key: str = "0" * 64) -> StageContext:
    """A stage's context: its output goes into an empty folder `output` of its home."""
    (home / "output").mkdir(parents=True)
    return StageContext(store, home / "output", Told() if told is None else told, Checkpoints(store, key))
