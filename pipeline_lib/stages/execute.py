"""Run one stage, or find its result: key, look-up, lease, process, commit.

The order is what makes a run safe to kill at any point: the result is committed as a whole or not
at all, and whoever runs the same stage again finds it or goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel

from pipeline_lib.config import stage_key
from pipeline_lib.errors import PipelineError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages import STAGES
from pipeline_lib.stages.child import run_in_child
from pipeline_lib.stages.contract import Events, StageContext, StageOutput
from pipeline_lib.stages.faults import kill_point
from pipeline_lib.storage.checkpoints import Checkpoints
from pipeline_lib.storage.embedded import hold
from pipeline_lib.storage.lease import Lease
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.validation import Frozen


class Job(Frozen):
    """One stage to run, as it crosses a process border. Holds no secret: keys are in the environment."""

    stage: str
    config: dict[str, object]
    inputs: dict[str, ArtifactRef]
    storage: S3Settings
    home: Path
    checkpoint_every_s: float = 60.0
    threads: int | None = None
    processes: int = 1
    """Processes that train together; changes no result, so it is not in the key."""
    sharding: Literal["none", "full"] = "none"
    """full: they divide every weight among themselves; changes no result either."""

    @property
    def key(self) -> str:
        """The stage key."""
        spec = STAGES[self.stage]
        config = getattr(spec.load(), spec.config_class).model_validate(self.config)
        return stage_key(spec.name, spec.version, config, self.inputs)

    @property
    def is_sharded(self) -> bool:
        """True where the processes divide the weights."""
        return self.sharding == "full"


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    ref: ArtifactRef
    is_cached: bool
    wall_s: float


def execute(job: Job, *, store: ArtifactStore, events: Events) -> Outcome:
    """Return the stage's artifact, running the stage only where it is not there yet.

    Raises:
        PipelineError: Of the stage, the store, or the child process.
    """
    started = time.monotonic()
    key = job.key
    found = store.find(key)
    if found is not None:
        Checkpoints(store, key).clear()  # left where a run was killed right after its commit
        return Outcome(found, is_cached=True, wall_s=time.monotonic() - started)
    if STAGES[job.stage].in_child:
        ref = run_in_child(job, key=key, events=events)
    else:
        ref = run_here(job, store=store, events=events, should_stop=lambda: False)
    return Outcome(ref, is_cached=False, wall_s=time.monotonic() - started)


def run_here(job: Job, *, store: ArtifactStore, events: Events, should_stop: Callable[[], bool]) -> ArtifactRef:
    """Run a stage in this process and commit its result, under the stage's lease."""
    started = time.monotonic()
    spec = STAGES[job.stage]
    key = job.key
    config = getattr(spec.load(), spec.config_class).model_validate(job.config)
    work = job.home / "work"
    work.mkdir(parents=True, exist_ok=True)
    sweep_dead_workdirs(work)
    # Held so that a child whose flow was killed can still commit its checkpoint to the embedded server.
    with hold(job.home), Lease.acquire(store, key, owner=f"{socket.gethostname()}/{os.getpid()}") as lease:
        found = store.find(key)  # another process may have finished while this one waited
        if found is not None:
            return found
        scratch = Path(tempfile.mkdtemp(prefix=f"{job.stage}-{os.getpid()}-", dir=work))
        try:
            (scratch / "output").mkdir()
            checkpoints = Checkpoints(store, key, lease=lease)
            context = StageContext(
                store=store, workdir=scratch / "output", events=events, checkpoints=checkpoints,
                checkpoint_every_s=job.checkpoint_every_s, should_stop=should_stop, is_sharded=job.is_sharded,
            )  # fmt: skip
            _warn_of_format(config, events)
            output = spec.run(config, job.inputs, context)
            assert isinstance(output, StageOutput)
            kill_point(job.stage, "before_commit")
            ref = store.commit(
                output.directory, kind=output.kind, stage=spec.name, stage_version=spec.version,
                config=config.model_dump(mode="json"), inputs=dict(job.inputs), metrics=output.metrics,
                measurements=_measurements(started), stage_key=key, lease=lease,
            )  # fmt: skip
            kill_point(job.stage, "after_commit")
            checkpoints.clear()
        except OSError as error:
            raise as_pipeline_error(error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return ref


def follow(job_json: str) -> None:
    """Take part in a stage as one of its further processes; the first one commits."""
    job = Job.model_validate_json(job_json)
    use_threads(job)
    _use_own_gpu()
    store = ArtifactStore(job.storage, cache_directory=job.home / "cache")
    spec = STAGES[job.stage]
    config = getattr(spec.load(), spec.config_class).model_validate(job.config)
    work = job.home / "work"
    work.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{job.stage}-{os.getpid()}-", dir=work))
    try:
        (scratch / "output").mkdir()
        kill_point(job.stage, f"process-{os.environ['RANK']}")
        context = StageContext(
            store, scratch / "output", _Silent(), Checkpoints(store, job.key), is_sharded=job.is_sharded
        )
        spec.run(config, job.inputs, context)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def use_threads(job: Job) -> None:
    """Give this process its share of the cores, or the number that the run configures."""
    import torch  # noqa: PLC0415  (stages without a model run without it)

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    elif job.processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))


def _use_own_gpu() -> None:
    """Give a further process a GPU of its own, before it loads a model; the first process has the first one."""
    import torch  # noqa: PLC0415  (as above)

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count())


def _warn_of_format(config: BaseModel, events: Events) -> None:
    """Say so where the configured number format is slow here, before hours go by."""
    precision = getattr(config, "precision", None)
    if precision is not None:
        from pipeline_lib.models.precision import slow_precision  # noqa: PLC0415  (torch)

        if (warning := slow_precision(precision)) is not None:
            events.log(warning)


class _Silent:
    """Events of a process whose first one tells them."""

    def progress(self, fraction: float, text: str) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def log(self, text: str) -> None: ...


def as_pipeline_error(error: OSError) -> PipelineError | OSError:
    """Name a disk that is full or cannot be used; any other error of the operating system stays as it is."""
    import errno  # noqa: PLC0415  (an error path only)

    from pipeline_lib.errors import DiskAccessError, DiskFullError  # noqa: PLC0415

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(Path.cwd()).free
        return DiskFullError(
            f"no room left on the disk while writing {error.filename or 'a file'} ({free:,} bytes free)",
            next_step="free some space and run the same command again; finished stages do not run again",
        )
    where = error.filename or "a file"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiskAccessError(
            f"{where} may not be written: {error.strerror}",
            next_step="set runtime.home to a folder that can be written, and run the same command again",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return DiskAccessError(
            f"{where} cannot be opened: {error.strerror}",
            next_step="raise the limit of open files (`ulimit -n 4096`) and run the same command again",
        )
    return error


def sweep_dead_workdirs(work: Path) -> None:
    """Remove the scratch folders of processes that are no more."""
    for folder in work.iterdir():
        pid = folder.name.split("-")[1] if folder.name.count("-") >= 2 else ""
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _measurements(started: float) -> Mapping[str, float]:
    memory = psutil.Process().memory_info()
    peak_bytes = float(_peak_rss_bytes() or memory.rss)
    return {"wall_s": time.monotonic() - started, "peak_rss_bytes": peak_bytes}


def _peak_rss_bytes() -> int:
    import resource  # noqa: PLC0415  (POSIX only)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
