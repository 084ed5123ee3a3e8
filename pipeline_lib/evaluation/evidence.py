"""The evidence that a gate weighs: every model's results on the same held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline_lib.errors import DataError
from pipeline_lib.evaluation.stats import Bootstrap
from pipeline_lib.schema import ExampleResult, Interval


@dataclass(frozen=True)
class Evidence:
    """Results by model name, all on the same prompts in the same order."""

    models: Mapping[str, tuple[ExampleResult, ...]]
    reward_model: Mapping[str, float | None]
    """Held-out figures of the reward model, the judge of win rates."""

    def __post_init__(self) -> None:
        """Refuse models that were measured on different prompts.

        Raises:
            DataError: Naming two models and the first prompt that only one of them has.
        """
        ids = {name: [row.record_id for row in rows] for name, rows in self.models.items()}
        first = next(iter(ids), None)
        for name, rows in ids.items():
            if first is not None and rows != ids[first]:
                odd = sorted(set(rows) ^ set(ids[first]))
                raise DataError(
                    f"{name!r} and {first!r} were evaluated on different prompts"
                    + (f", e.g. {odd[0][:12]}" if odd else " (another order)"),
                    next_step="evaluate both with one configuration on one dataset",
                )


class GateMetric(Protocol):
    """A frozen class whose fields are the metric's parameters."""

    unit: str
    against: str | None

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: Bootstrap) -> Interval:
        """Measure a candidate; an Interval of None where a figure is missing."""
