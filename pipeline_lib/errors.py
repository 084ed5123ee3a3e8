"""Errors a user can cause or meet: one line of cause, one line of what to do, an exit code.

Every class here is raised with a cause and a next step. The command line prints both and exits
with `exit_code`; a stack trace appears only with `--debug`. The table in docs/errors.md is
generated from this file.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Stop with a cause and a next step the user can act on.

    Attributes:
        code: Stable name of the error class, e.g. `E_CONFIG`.
        exit_code: Process exit code of the command line.
        cause: One line: what was wrong and where (file:line, key, row).
        next_step: One line: what to do about it.
        is_transient: True where trying again later may help without any change.
    """

    code = "E_INTERNAL"
    exit_code = 1
    is_transient = False

    def __init__(self, cause: str, *, next_step: str) -> None:
        super().__init__(f"{self.code}: {cause}\n  next: {next_step}")
        self.cause = cause
        self.next_step = next_step

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.cause, self.next_step))


def _rebuild(cls: type[PipelineError], cause: str, next_step: str) -> PipelineError:
    return cls(cause, next_step=next_step)


class ConfigError(PipelineError):
    """A configuration file, key or value cannot be used."""

    code, exit_code = "E_CONFIG", 10


class DataError(PipelineError):
    """Input data cannot be used: nothing left after reading or filtering, or a broken promise."""

    code, exit_code = "E_DATA", 11


class ModelNotFoundError(PipelineError):
    """The base model is not at the given place, or is not a causal language model."""

    code, exit_code = "E_MODEL_NOT_FOUND", 12


class MemoryLimitError(PipelineError):
    """The configuration needs more memory than the machine has, or a child was killed for it."""

    code, exit_code = "E_OOM", 13


class StorageError(PipelineError):
    """The object store cannot be reached or answered with a server error after all tries."""

    code, exit_code, is_transient = "E_STORAGE", 20, True


class AuthError(PipelineError):
    """The object store refused the credentials."""

    code, exit_code = "E_AUTH", 21


class BucketError(PipelineError):
    """The bucket does not exist or may not be used."""

    code, exit_code = "E_BUCKET", 22


class IntegrityError(PipelineError):
    """A stored file is missing, or its sha256 or size is not the one its manifest promises."""

    code, exit_code = "E_INTEGRITY", 23


class DiskFullError(PipelineError):
    """A local disk has no room left."""

    code, exit_code = "E_DISK_FULL", 24


class PortTakenError(PipelineError):
    """A port that an embedded server needs is in use."""

    code, exit_code = "E_PORT_TAKEN", 25


class ConditionalWriteError(PipelineError):
    """The S3 server ignores conditional writes, so pointers and leases would not be safe on it."""

    code, exit_code = "E_NO_CONDITIONAL_WRITES", 26


class DiskAccessError(PipelineError):
    """A local file or folder cannot be opened: no permission, a read-only disk, too many open files."""

    code, exit_code = "E_DISK_ACCESS", 27


class DivergedError(PipelineError):
    """Training stopped itself: a non-finite number, a KL explosion or a broken invariant."""

    code, exit_code = "E_DIVERGED", 30

    def __init__(self, cause: str, *, next_step: str, row_ids: tuple[str, ...] = ()) -> None:
        """Take the ids of the rows that the training stopped at; a training stage saves them in a file."""
        super().__init__(cause, next_step=next_step)
        self.row_ids = row_ids


class ChildDiedError(PipelineError):
    """The process of a training stage ended without a result."""

    code, exit_code, is_transient = "E_CHILD_DIED", 31, True


class ResumeMismatchError(PipelineError):
    """A checkpoint does not belong to the configuration or the data it should resume."""

    code, exit_code = "E_RESUME_MISMATCH", 32


class RewardError(PipelineError):
    """A reward source could not score a response: its program failed, hung or gave no number."""

    code, exit_code = "E_REWARD", 33


class GeneratorError(PipelineError):
    """A generator of responses, such as a vLLM server, cannot be reached or does not answer as it must."""

    code, exit_code, is_transient = "E_GENERATOR", 34, True


class JudgeError(PipelineError):
    """A judge of responses cannot be asked, or too few of its verdicts can be read."""

    code, exit_code = "E_JUDGE", 35


class LabelsWantedError(PipelineError):
    """People have to label responses before the run can go on; nothing is wrong."""

    code, exit_code = "E_LABELS_WANTED", 36


class PrefectUnavailableError(PipelineError):
    """The Prefect server does not answer."""

    code, exit_code, is_transient = "E_PREFECT", 40, True


class TrackingError(PipelineError):
    """MLflow does not answer where its answer is needed: registration and promotion."""

    code, exit_code, is_transient = "E_MLFLOW", 41, True


class ConflictError(PipelineError):
    """Another process changed a pointer first."""

    code, exit_code = "E_CONFLICT", 74


class HeldError(PipelineError):
    """Another live process holds the lease of the same stage."""

    code, exit_code, is_transient = "E_HELD", 75, True


class InterruptedRunError(PipelineError):
    """The run was interrupted by SIGINT or SIGTERM after committing a checkpoint."""

    code, exit_code = "E_INTERRUPTED", 143
