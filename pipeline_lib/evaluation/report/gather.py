"""Collect what the report shows from the artifacts under a verdict.

What is not there (a run without PPO, a data set that was not filtered) is left out, and the page
leaves its section out with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_lib.evaluation.report.labelled_rounds import LabelledRound, labelled_rounds
from pipeline_lib.evaluation.report.lineage import Lineage, Node, walk
from pipeline_lib.evaluation.report.policy_runs import POLICY_STAGES, PolicyRun, policy_run
from pipeline_lib.evaluation.report.series import Series, is_finite, rows_of, series_of
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
_TRAINING_ORDER = ("sft", "reward", "preference", "conditional", "ppo", "rloo", "grpo")
_MAIN_CARD = "reward"


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
class RewardCard:
    """The report card of one reward model."""

    name: str
    """`reward` for the one that candidates are judged by, the run's name for each further one."""
    figures: dict[str, float]
    """Plain figures."""
    tables: ReportCard | None
    """The same card with its tables; None in runs from before it had any."""


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
    policy_runs: tuple[PolicyRun, ...]
    """Trainings on the policy's own samples."""
    labelled_rounds: tuple[LabelledRound, ...]
    """Rounds that a judge or people labelled."""
    examples: dict[str, list[ExampleResult]]
    """Held-out results by model, base first."""
    cards: tuple[RewardCard, ...]
    """Of every reward model, the one that candidates are judged by first."""
    prompts: tuple[PromptAnswers, ...]


def gather(
    store: ArtifactStore,
    *,
    verdict: ArtifactRef,
    dataset: ArtifactRef,
    reward_models: Mapping[str, ArtifactRef],
    name: str,
    sampled_prompts: int,
    promotes: bool,
) -> ReportData:
    """Read all that the page shows.

    Args:
        store: Where artifacts are read.
        verdict: The gate's artifact; evaluations and models are found from its inputs.
        dataset: The dataset that the stages trained on.
        reward_models: The run's further reward models by name.
        name: The run's name.
        sampled_prompts: Held-out prompts to show with all answers.
        promotes: Whether the run promotes its winner.

    Raises:
        PipelineError: Of the store, where an artifact is missing or damaged.
    """
    lineage = walk(store, verdict, dataset, *reward_models.values())
    examples = _examples(store, lineage[verdict])
    trainings = _trainings(store, lineage, {ref: name for name, ref in reward_models.items()})
    sampling = [node for node in lineage.own if node.stage in POLICY_STAGES and node.has("metrics.jsonl")]
    sampling.sort(key=lambda node: (_place(node.stage, _TRAINING_ORDER), node.names))
    return ReportData(
        name=name,
        promotes=promotes,
        verdict=Verdict.model_validate(store.read_json(verdict, "verdict.json")),
        lineage=lineage,
        funnels=tuple(_funnel(store, node) for node in lineage.own if node.has("funnel.json")),
        splits=_splits(store, lineage[dataset]),
        trainings=trainings,
        policy_runs=tuple(policy_run(store, node) for node in sampling),
        labelled_rounds=labelled_rounds(store, lineage),
        examples=examples,
        cards=_cards(store, lineage, lineage[verdict].manifest.inputs.get("reward_model"), reward_models),
        prompts=_prompts(examples, sampled_prompts),
    )


def _funnel(store: ArtifactStore, node: Node) -> Funnel:
    steps = tuple(FunnelStep.model_validate(step) for step in store.read_json(node.ref, "funnel.json"))
    rejections: list[Rejection] = []
    seen: dict[str, int] = {}
    if node.has("rejections.jsonl"):
        for row in rows_of(store, node.ref, "rejections.jsonl"):
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


def _trainings(store: ArtifactStore, lineage: Lineage, further: Mapping[ArtifactRef, str]) -> tuple[Training, ...]:
    nodes = [node for node in lineage.own if node.has("metrics.jsonl")]
    nodes.sort(key=lambda node: (_place(node.stage, _TRAINING_ORDER), node.names))
    return tuple(
        Training(
            node.stage, (further[node.ref],) if node.ref in further else node.names, node.ref,
            series_of(rows_of(store, node.ref, "metrics.jsonl"), "step"),
            store.read_json(node.ref, "training.json") if node.has("training.json") else {},
        )
        for node in nodes
    )  # fmt: skip


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


def _cards(
    store: ArtifactStore, lineage: Lineage, main: ArtifactRef | None, further: Mapping[str, ArtifactRef]
) -> tuple[RewardCard, ...]:
    """Read the report card of every reward model that has one."""
    named = {_MAIN_CARD: main, **further}
    found = []
    for name, ref in named.items():
        if ref is not None and lineage[ref].has("report_card.json"):
            card: dict[str, Any] = store.read_json(ref, "report_card.json")
            figures = {figure: float(value) for figure, value in card.items() if is_finite(value)}
            found.append(RewardCard(name, figures, _card_tables(card)))
    return tuple(found)


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


def _place(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
