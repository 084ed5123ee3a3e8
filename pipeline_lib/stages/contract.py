"""What a stage is: its configuration class, its version, and `run(config, inputs, context)`.

A stage is a pure function from (configuration, input artifacts) to the files of one output
artifact. It reads inputs through `context.store`, writes its files into `context.workdir` and
returns a `StageOutput`; committing, caching, leases and processes are `stages/execute.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline_lib.schema import ArtifactRef
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.store import ArtifactStore

Inputs = Mapping[str, ArtifactRef]


class Events(Protocol):
    """Where a running stage tells what it is doing. No method may raise or block for long."""

    def progress(self, fraction: float, text: str) -> None:
        """Tell the share of the work done, 0 to 1, and in words what is going on."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Tell figures of one optimizer step."""

    def log(self, text: str) -> None:
        """Tell one line worth reading."""


@dataclass(frozen=True)
class StageContext:
    """What a running stage may use besides its configuration and inputs."""

    store: ArtifactStore
    workdir: Path
    """Empty directory for the output files."""
    events: Events
    checkpoints: Checkpoints
    """Where a training stage commits its checkpoints and finds them again."""
    checkpoint_every_s: float = 60.0
    """Seconds between checkpoints of a training stage, at most."""
    should_stop: Callable[[], bool] = lambda: False
    """True once the process was asked to end: commit a checkpoint and raise InterruptedRunError."""
    is_sharded: bool = False
    """True where the processes of a training stage divide every weight among themselves."""

    def progress(self, fraction: float, text: str) -> None:
        """Tell the share of the work done and what is going on."""
        self.events.progress(fraction, text)

    def log(self, text: str) -> None:
        """Tell one line worth reading."""
        self.events.log(text)


@dataclass(frozen=True)
class StageOutput:
    """The files a stage made, before they are an artifact."""

    kind: str
    """Kind of the artifact: `rows`, `dataset`, `model`, `reward_model`, `evaluation`, `verdict`, ..."""
    directory: Path
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Figures for the manifest; deterministic ones only belong into files."""
