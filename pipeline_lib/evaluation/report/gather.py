"""Collect what the report shows from the artifacts under a verdict.

What is not there (a run without PPO, a data set that was not filtered) is left out, and the page
leaves its section out with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_lib.evaluation.report.lineage import Lineage, Node, walk
from pipeline_lib.evaluation.report_card import ReportCard
from pipeline_lib.hashing import derive_seed
from pipeline_lib.schema import (
    ArtifactRef,
    ExampleResult,
    FunnelStep,
    Message,
    Record,
    Rejection,
    Split,
    Verdict,
)

if TYPE_CHECKING:
    from pipeline_lib.storage.store import ArtifactStore

_EXAMPLES_PER_CODE = 2
_MOST_EXAMPLES = 24
_MODEL_ORDER = ("base", "sft", "dpo", "ppo", "champion")
_TRAINING_ORDER = ("sft", "reward", "preference", "conditional", "ppo")
_SAMPLED_ITERATIONS = 3

Series = dict[str, list[tuple[float, float]]]
"""(step, value) by the figure's name, finite values only."""


@dataclass(frozen=True)
class Funnel:
    """One artifact of rows: what every reader or rule did."""

    stage: str
    steps: tuple[FunnelStep, ...]
    rejections: tuple[Rejection, ...]
    """A few rejected rows of each code, in the order of the file."""
    is_parallel: bool
    """True where the steps are sources beside each other, not rules after each other."""

    @property
    def rows_in(self) -> int:
        """Rows that reached the artifact."""
        return sum(step.rows_in for step in self.steps) if self.is_parallel else self.steps[0].rows_in

    @property
    def rows_kept(self) -> int:
        """Rows that the artifact holds."""
        return sum(step.rows_kept for step in self.steps) if self.is_parallel else self.steps[-1].rows_kept

    @property
    def codes(self) -> dict[str, int]:
        """Rejected rows by code, most first."""
        totals: dict[str, int] = {}
        for step in self.steps:
            for code, rows in step.rejected.items():
                totals[code] = totals.get(code, 0) + rows
        return dict(sorted(totals.items(), key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True)
class SplitRows:
    """How many rows of each kind a split holds."""

    split: Split
    kinds: dict[str, int]

    @property
    def rows(self) -> int:
        """All rows of the split."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Training:
    """A training stage: its figures over steps."""

    stage: str
    names: tuple[str, ...]
    """The run's names of the model it made, e.g. `simpo`; mostly none or one."""
    ref: ArtifactRef
    series: Series
    facts: dict[str, Any]
    """`training.json`, empty where there is none."""


@dataclass(frozen=True)
class PolicySample:
    """A rollout that PPO kept."""

    iteration: int
    prompt: str
    response: str
    score: float | None


@dataclass(frozen=True)
class Ppo:
    """PPO over iterations."""

    series: Series
    """Figures by iteration, counted from 1."""
    samples: tuple[PolicySample, ...]


@dataclass(frozen=True)
class PromptAnswers:
    """A held-out prompt and what every model answered."""

    prompt: tuple[Message, ...]
    reference: str
    answers: dict[str, ExampleResult]


@dataclass(frozen=True)
class ReportData:
    """Everything on the page."""

    name: str
    promotes: bool
    verdict: Verdict
    lineage: Lineage
    funnels: tuple[Funnel, ...]
    splits: tuple[SplitRows, ...]
    trainings: tuple[Training, ...]
    ppo: Ppo | None
    examples: dict[str, list[ExampleResult]]
    """Held-out results by model, base first."""
    report_card: dict[str, float]
    """Plain figures of the reward model's report card; empty where there is none."""
    card_tables: ReportCard | None
    """The same card with its tables; None in runs from before it had any."""
    prompts: tuple[PromptAnswers, ...]


def gather(
    store: ArtifactStore, *, verdict: ArtifactRef, dataset: ArtifactRef, name: str, sampled_prompts: int, promotes: bool
) -> ReportData:
    """Read all that the page shows.

    Args:
        store: Where artifacts are read.
        verdict: The gate's artifact; evaluations and models are found from its inputs.
        dataset: The dataset that the stages trained on.
        name: The run's name.
        sampled_prompts: Held-out prompts to show with all answers.
        promotes: Whether the run promotes its winner.

    Raises:
        PipelineError: Of the store, where an artifact is missing or damaged.
    """
    lineage = walk(store, verdict, dataset)
    examples = _examples(store, lineage[verdict])
    trainings = _trainings(store, lineage)
    card = _report_card(store, lineage)
    ppo = [node for node in lineage.own if node.stage == "ppo" and node.has("metrics.jsonl")]
    return ReportData(
        name=name,
        promotes=promotes,
        verdict=Verdict.model_validate(store.read_json(verdict, "verdict.json")),
        lineage=lineage,
        funnels=tuple(_funnel(store, node) for node in lineage.own if node.has("funnel.json")),
        splits=_splits(store, lineage[dataset]),
        trainings=trainings,
        ppo=_ppo(store, ppo[-1]) if ppo else None,
        examples=examples,
        report_card={name: float(value) for name, value in card.items() if _is_finite(value)},
        card_tables=_card_tables(card),
        prompts=_prompts(examples, sampled_prompts),
    )


def _funnel(store: ArtifactStore, node: Node) -> Funnel:
    steps = tuple(FunnelStep.model_validate(step) for step in store.read_json(node.ref, "funnel.json"))
    rejections: list[Rejection] = []
    seen: dict[str, int] = {}
    if node.has("rejections.jsonl"):
        for row in _rows(store, node.ref, "rejections.jsonl"):
            seen[row["code"]] = seen.get(row["code"], 0) + 1
            if seen[row["code"]] <= _EXAMPLES_PER_CODE and len(rejections) < _MOST_EXAMPLES:
                rejections.append(Rejection.model_validate(row))
    return Funnel(node.stage, steps, tuple(rejections), is_parallel=node.manifest.kind == "rows")


def _splits(store: ArtifactStore, dataset: Node) -> tuple[SplitRows, ...]:
    """Count the rows of each split by kind, from the files that the stages read."""
    found = []
    for split in Split:
        path = f"{split.value}.jsonl"
        if dataset.has(path):
            kinds: dict[str, int] = {}
            for line in store.read_lines(dataset.ref, path):
                kind = Record.model_validate_json(line).kind
                kinds[kind] = kinds.get(kind, 0) + 1
            found.append(SplitRows(split, dict(sorted(kinds.items()))))
    return tuple(found)


def _trainings(store: ArtifactStore, lineage: Lineage) -> tuple[Training, ...]:
    nodes = [node for node in lineage.own if node.has("metrics.jsonl")]
    nodes.sort(key=lambda node: (_place(node.stage, _TRAINING_ORDER), node.names))
    return tuple(
        Training(
            node.stage, node.names, node.ref, _series(list(_rows(store, node.ref, "metrics.jsonl")), "step"),
            store.read_json(node.ref, "training.json") if node.has("training.json") else {},
        )
        for node in nodes
    )  # fmt: skip


def _series(rows: list[dict[str, Any]], along: str) -> Series:
    series: Series = {}
    for row in rows:
        for figure, value in row.items():
            if figure != along and _is_finite(value):
                series.setdefault(figure, []).append((float(row[along]), float(value)))
    return series


def _ppo(store: ArtifactStore, node: Node) -> Ppo:
    by_iteration: dict[int, dict[str, Any]] = {}
    for row in _rows(store, node.ref, "metrics.jsonl"):
        if _is_finite(row.get("iteration")):
            by_iteration[int(row["iteration"]) + 1] = {**row, "iteration": row["iteration"] + 1}
    samples = []
    if node.has("samples.jsonl"):
        rows = list(_rows(store, node.ref, "samples.jsonl"))
        shown = _spread(sorted({int(row["iteration"]) for row in rows}), _SAMPLED_ITERATIONS)
        samples = [
            PolicySample(
                int(row["iteration"]) + 1, str(row["prompt"]), str(row["response"]),
                float(row["score"]) if _is_finite(row["score"]) else None,
            )
            for row in rows
            if int(row["iteration"]) in shown
        ]  # fmt: skip
    return Ppo(_series(list(by_iteration.values()), "iteration"), tuple(samples))


def _spread(values: list[int], most: int) -> list[int]:
    """Return at most so many values, the first and the last among them, evenly between."""
    if len(values) <= most:
        return values
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def _examples(store: ArtifactStore, verdict: Node) -> dict[str, list[ExampleResult]]:
    names = [key.partition(":")[2] for key in verdict.manifest.inputs if key.startswith("evaluation:")]
    names.sort(key=lambda name: _place(name, _MODEL_ORDER))
    return {
        name: [
            ExampleResult.model_validate_json(line)
            for line in store.read_lines(verdict.manifest.inputs[f"evaluation:{name}"], "examples.jsonl")
        ]
        for name in names
    }


def _report_card(store: ArtifactStore, lineage: Lineage) -> dict[str, Any]:
    for node in reversed(lineage.own):
        if node.has("report_card.json"):
            card: dict[str, Any] = store.read_json(node.ref, "report_card.json")
            return card
    return {}


def _card_tables(card: dict[str, Any]) -> ReportCard | None:
    tables = ReportCard.model_fields.keys() - {"figures"}
    if not tables <= card.keys():
        return None
    return ReportCard.model_validate({"figures": {}, **{name: card[name] for name in tables}})


def _prompts(examples: dict[str, list[ExampleResult]], most: int) -> tuple[PromptAnswers, ...]:
    """Choose prompts that every model answered, by a seed that does not depend on the answers."""
    by_model = {name: {row.record_id: row for row in rows} for name, rows in examples.items()}
    if not by_model:
        return ()
    shared = set.intersection(*(set(rows) for rows in by_model.values()))
    chosen = sorted(shared, key=lambda record_id: derive_seed(0, "report", record_id))[:most]
    first = next(iter(by_model.values()))
    return tuple(
        PromptAnswers(
            first[record_id].prompt, first[record_id].reference,
            {name: rows[record_id] for name, rows in by_model.items()},
        )
        for record_id in chosen
    )  # fmt: skip


def _rows(store: ArtifactStore, ref: ArtifactRef, path: str) -> Iterator[dict[str, Any]]:
    for line in store.read_lines(ref, path):
        yield json.loads(line)


def _place(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
