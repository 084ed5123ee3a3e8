"""The models side by side: every metric of the gate as a figure of each model, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.gate_metrics import GATE_METRICS
from pipeline_lib.evaluation.report.charts import interval_chart
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.schema import ExampleResult, Interval

_LESS, _MORE = "lower is better", "higher is better"


@dataclass(frozen=True)
class ComparisonRow:
    """One metric over all models."""

    metric: str
    """The gate metric's name."""
    title: str
    unit: str
    direction: str
    is_key: bool
    """True for the figures that also stand under the verdict."""
    has_before: bool
    """True where the base model's figure is a fair thing to start from."""
    intervals: dict[str, Interval]
    drawing: Markup

    @property
    def note(self) -> str:
        """Unit and direction in one line."""
        return " · ".join(part for part in (self.unit, self.direction) if part)


@dataclass(frozen=True)
class _Shown:
    """A gate metric as the report shows it."""

    title: str
    spec: dict[str, Any]
    unit: str
    direction: str
    is_key: bool = False


_SHOWN = (
    _Shown("Perplexity", {"name": "perplexity"}, "of the reference answers", _LESS, is_key=True),
    _Shown("ROUGE-L", {"name": "rouge_l"}, "F1 against the reference", _MORE, is_key=True),
    _Shown("Reward-model score", {"name": "score"}, "", _MORE),
    _Shown(
        "Win rate against base", {"name": "win_rate", "against": "base"}, "by score, same prompt", _MORE, is_key=True
    ),
    _Shown("KL from the SFT model", {"name": "kl"}, "nats a response", "", is_key=True),
    _Shown("Response length", {"name": "length"}, "tokens", ""),
    _Shown("Distinct bigrams", {"name": "distinct_n"}, "share of all", _MORE),
    _Shown("Ended by itself", {"name": "finished"}, "share of responses", _MORE),
)


def compare(examples: Mapping[str, Sequence[ExampleResult]], bootstrap: Bootstrap) -> list[ComparisonRow]:
    """Measure every model on every metric.

    Args:
        examples: Held-out results by model, all on the same prompts.
        bootstrap: How intervals are computed.

    Returns:
        A row for each metric that at least one model has a figure for.
    """
    if not any(examples.values()):
        return []
    evidence = Evidence(models={name: tuple(rows) for name, rows in examples.items()}, reward_model={})
    rows = []
    for shown in _SHOWN:
        against = shown.spec.get("against")
        if against is not None and against not in examples:
            continue
        metric = GATE_METRICS.build(shown.spec)
        intervals = {
            name: _unknown(bootstrap) if name == against else metric.measure(evidence, name, bootstrap=bootstrap)
            for name in examples
        }
        if any(interval.value is not None for interval in intervals.values()):
            drawing = _drawing(shown, intervals)
            rows.append(
                ComparisonRow(
                    str(shown.spec["name"]), shown.title, shown.unit, shown.direction, shown.is_key,
                    has_before=bool(shown.direction) and against is None, intervals=intervals, drawing=drawing,
                )
            )  # fmt: skip
    return rows


def _drawing(shown: _Shown, intervals: dict[str, Interval]) -> Markup:
    against = shown.spec.get("against")
    drawn = [(name, interval) for name, interval in intervals.items() if name != against]
    base = intervals.get("base")
    baseline = base.value if base is not None and shown.spec["name"] != "kl" else None
    if against is not None:
        baseline = 0.5
    return interval_chart(drawn, title=f"{shown.title} of every model", baseline=baseline)


def accuracy_interval(report_card: Mapping[str, float], bootstrap: Bootstrap) -> Interval:
    """Return the reward model's held-out accuracy with its interval, as the gate sees it."""
    metric = GATE_METRICS.build({"name": "reward_model_accuracy"})
    found: Interval = metric.measure(Evidence(models={}, reward_model=report_card), "", bootstrap=bootstrap)
    return found


def _unknown(bootstrap: Bootstrap) -> Interval:
    return Interval(value=None, low=None, high=None, confidence_frac=bootstrap.confidence_frac, num_examples=0)
