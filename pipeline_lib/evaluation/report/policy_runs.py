"""What the trainings on a policy's own samples left: figures by iteration, kept samples, breaches of limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_lib.evaluation.report.lineage import Node
from pipeline_lib.evaluation.report.series import Series, is_finite, rows_of, series_of
from pipeline_lib.schema import ArtifactRef

if TYPE_CHECKING:
    from pipeline_lib.storage.store import ArtifactStore

POLICY_STAGES = ("ppo", "rloo", "grpo")
"""The stages that sample, score and update in one training."""
_SAMPLED_ITERATIONS = 3


@dataclass(frozen=True)
class PolicySample:
    """A rollout that was kept."""

    iteration: int
    prompt: str
    response: str
    score: float | None


@dataclass(frozen=True)
class PolicyRun:
    """One training over its iterations."""

    stage: str
    names: tuple[str, ...]
    """The run's names of the model it made, mostly one."""
    ref: ArtifactRef
    series: Series
    """Figures by iteration, counted from 1."""
    samples: tuple[PolicySample, ...]
    """Of the first, the middle and the last iteration."""
    breaches: tuple[str, ...]
    """What the circuit breaker stopped at, in words."""
    best_iteration: int | None
    """The iteration, from 1, before which the weights are the best ones; None without a breach."""


def policy_run(store: ArtifactStore, node: Node) -> PolicyRun:
    """Read what one training left.

    Args:
        store: Where the artifact is read.
        node: Of one of `POLICY_STAGES`, with `metrics.jsonl`.
    """
    by_iteration: dict[int, dict[str, Any]] = {}
    for row in rows_of(store, node.ref, "metrics.jsonl"):
        if is_finite(row.get("iteration")):
            number = int(row["iteration"]) + 1
            by_iteration[number] = {**row, "iteration": number}
    facts = store.read_json(node.ref, "training.json") if node.has("training.json") else {}
    best: Any = facts.get("best_iteration")
    return PolicyRun(
        node.stage, node.names, node.ref, series_of(by_iteration.values(), "iteration"), _samples(store, node),
        tuple(str(each) for each in facts.get("breaches", ())), int(best) + 1 if is_finite(best) else None,
    )  # fmt: skip


def _samples(store: ArtifactStore, node: Node) -> tuple[PolicySample, ...]:
    if not node.has("samples.jsonl"):
        return ()
    rows = list(rows_of(store, node.ref, "samples.jsonl"))
    shown = _spread(sorted({int(row["iteration"]) for row in rows}), _SAMPLED_ITERATIONS)
    return tuple(
        PolicySample(
            int(row["iteration"]) + 1, str(row["prompt"]), str(row["response"]),
            float(row["score"]) if is_finite(row["score"]) else None,
        )
        for row in rows
        if int(row["iteration"]) in shown
    )  # fmt: skip


def _spread(values: list[int], most: int) -> list[int]:
    """Return at most so many values, the first and the last among them, evenly between."""
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
