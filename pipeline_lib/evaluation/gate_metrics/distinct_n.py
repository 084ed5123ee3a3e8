"""Diversity of the answers: an alarm for mode collapse."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.text_metrics import distinct_n
from pipeline_lib.schema import Interval
from pipeline_lib.validation import Frozen


class DistinctN(Frozen):
    """Different word n-grams over all, over the answers together, or its ratio to another model's.

    A resample with repeated prompts would repeat their n-grams and so be biased. The interval is that
    of subsamples of half the prompts: m of N drawn without replacement scatter sqrt((N - m) / m) times
    as much as a figure of N prompts does.

    Source: the delete-d jackknife, Shao and Wu 1989.
    """

    unit: ClassVar[str] = "fraction, or a ratio"
    against: str | None = None
    """A model of the run: the ratio to it; null: the figure itself."""
    n: int = Field(2, ge=1, le=5)
    """Words of an n-gram."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval."""
        mine = [row.response for row in evidence.models[candidate]]
        theirs = [row.response for row in evidence.models[self.against]] if self.against else None
        everyone = list(range(len(mine)))
        value = self._figure(mine, theirs, everyone)
        generator = np.random.Generator(np.random.PCG64(bootstrap.seed))
        half = max(1, len(mine) // 2)
        draws = [
            self._figure(mine, theirs, generator.permutation(len(mine))[:half].tolist())
            for _ in range(min(bootstrap.resamples, 200))
        ]
        found = [draw for draw in draws if draw is not None]
        if value is None or len(found) < len(draws) or len(mine) < 2:
            return Interval(
                value=None,
                low=None,
                high=None,
                confidence_frac=bootstrap.confidence_frac,
                num_examples=len(mine),
            )
        spread = (np.array(found) - float(np.mean(found))) * np.sqrt(half / (len(mine) - half))
        tail = (1 - bootstrap.confidence_frac) / 2
        low, high = np.quantile(spread, [tail, 1 - tail])
        return Interval(
            value=value, low=value + float(low), high=value + float(high),
            confidence_frac=bootstrap.confidence_frac, num_examples=len(mine),
        )  # fmt: skip

    def _figure(self, mine: list[str], theirs: list[str] | None, chosen: list[int]) -> float | None:
        own = distinct_n((mine[index] for index in chosen), self.n)
        if theirs is None:
            return own
        other = distinct_n((theirs[index] for index in chosen), self.n)
        return None if own is None or not other else own / other
