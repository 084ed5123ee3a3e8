"""What is measured: the jobs, the presets, and the plan of one run as both sides read it.

Light: imports no torch, so that the driver's own memory does not count in its children's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.models.settings import Precision
from pipeline_lib.validation import Frozen

JobName = Literal["dpo", "dpo_in_step", "reward", "sft", "kwise"]
Side = Literal["ours", "peer", "ours_pairs"]
Trainable = Literal["lora", "full"]


class JobSpec(Frozen):
    """One line of the table."""

    name: JobName
    title: str
    stage: Literal["preference", "reward", "sft"]
    """The stage whose `run` is measured on our side."""
    responses: int
    """Responses of a row: 1 a demonstration, 2 a pair, 4 a comparison of four."""
    unit: Literal["pairs", "tokens"]
    other: Literal["peer", "ours_pairs"] = "peer"
    """What ours is measured against: TRL, or ourselves with every pair as a row of its own."""
    speed_goal: float
    """Times faster, at least."""
    memory_goal: float | None = None
    """Share of the other side's peak memory, at most."""


JOBS: dict[JobName, JobSpec] = {
    spec.name: spec
    for spec in (
        JobSpec(
            name="dpo", title="DPO, reference computed before on both sides", stage="preference", responses=2,
            unit="pairs", speed_goal=4.0, memory_goal=0.5,
        ),
        JobSpec(
            name="dpo_in_step", title="DPO, reference within TRL's step; ours with its pass counted",
            stage="preference", responses=2, unit="pairs", speed_goal=6.0,
        ),
        JobSpec(name="reward", title="reward model, the same pairs", stage="reward", responses=2, unit="pairs",
                speed_goal=3.0),
        JobSpec(
            name="sft", title="SFT, packed on both sides", stage="sft", responses=1, unit="tokens",
            speed_goal=2.5, memory_goal=0.7,
        ),
        JobSpec(
            name="kwise", title="reward model, four responses a prompt, against our own pairs", stage="reward",
            responses=4, unit="pairs", other="ours_pairs", speed_goal=2.0,
        ),
    )
}  # fmt: skip


class Preset(Frozen):
    """How large a run is."""

    model: str
    """A base model's name (`pipeline_lib.models.base`), or `llama-1b`: random weights."""
    rows_per_step: int
    """Rows of one update; a fourth of it for comparisons of four."""
    steps: int
    """Updates; the first is not timed."""
    runs: int
    """Paired runs, interleaved; the median counts."""
    pack_tokens: int
    """Tokens of TRL's packed sequences."""


PRESETS: dict[str, Preset] = {
    "smollm2": Preset(
        model="smollm2-135m-instruct", rows_per_step=8, steps=8, runs=3, pack_tokens=1024
    ),
    "tiny": Preset(model="tiny-random", rows_per_step=8, steps=4, runs=2, pack_tokens=1024),
    "llama-1b": Preset(model="llama-1b", rows_per_step=32, steps=12, runs=3, pack_tokens=4096),
}  # fmt: skip


class Options(Frozen):
    """What the command line chose."""

    preset: str
    trainable: Trainable = "lora"
    precision: Precision = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int
    rows_per_step: int
    steps: int
    runs: int
    pack_tokens: int
    peer_rows: int | None = None
    """Rows of one of TRL's forwards; None: the fastest of some, tried out before it is measured."""
    tokens_per_batch: int | None = None
    """Tokens of one of our forwards; None: the stage's own default."""
    gradient_checkpointing: bool = False
    """On both sides."""


class Plan(Frozen):
    """What one process measures; written as JSON, read by both sides."""

    job: JobName
    side: Side
    options: Options
    folder: Path
    """Where the job's prepared files are."""
    output: Path
    """Where the figures go."""


class StepsFile(Frozen):
    """Rows in the order of the updates, as token ids: what our side trains on, for the other side to take."""

    steps: list[list[dict[str, Any]]]
    """Each row `{"prompt": ids, "responses": [ids, ...]}`, the better response first."""
    pack_bins: int | None = None
    """SFT: packed sequences of TRL's a step, the same number in every step."""


class Work(Frozen):
    """The arithmetic that a timed part of a job needs at least, for the share of the machine in use."""

    pairs: int
    """(better, worse) pairs."""
    tokens: int
    """Tokens of the rows as they are, the prompt once for each response."""
    counted_tokens: int
    flops: float
    """Multiply-adds times two, the prompt once for all its responses, the head on counted tokens alone."""


class Measured(Frozen):
    """What one process found out."""

    side: Side
    losses: list[float]
    """One for each update."""
    step_ends_s: list[float]
    """When each update was done, from an arbitrary start."""
    reference_s: float = Field(0.0, ge=0)
    """Seconds of the reference pass that count in the job."""
    peak_bytes: int
    """Peak resident memory of the process until training was over."""
    peak_gpu_bytes: int = 0
    digests: list[str]
    """One for each update, of its rows' token ids and counted labels, as they reached the model."""
    tokens: int
    """Token ids that reached the model, without padding, the prompt once for each response."""
    counted_tokens: int
    """Labels that count in the loss; 0 for a reward model."""
    trainable_parameters: int
    note: str = ""
    """The settings of this side in words."""
    versions: dict[str, str]

    @property
    def timed_s(self) -> float:
        """Seconds of the updates after the first, with their share of the reference pass."""
        num_steps = len(self.step_ends_s)
        share = (num_steps - 1) / num_steps
        return self.step_ends_s[-1] - self.step_ends_s[0] + share * self.reference_s


class Result(Frozen):
    """A job's runs, and what they say."""

    job: JobName
    options: Options
    processor: str
    dtype: str
    matmul_flops: dict[str, float]
    """Measured matrix-product rate by format, operations a second."""
    work: Work
    """Of the timed updates."""
    runs: dict[Side, list[Measured]]
    problems: list[str]
    """Why the comparison does not count; empty: it counts."""
