"""BLEU against the reference answers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from pipeline_lib.evaluation import stats
from pipeline_lib.evaluation.evidence import Evidence
from pipeline_lib.evaluation.stats import Array
from pipeline_lib.evaluation.text_metrics import words
from pipeline_lib.schema import Interval
from pipeline_lib.text.bleu import overlap
from pipeline_lib.validation import Frozen


class Bleu(Frozen):
    """BLEU of the answers, all prompts together, or its gain over another model; words as in ROUGE.

    Matches and n-grams are summed over the prompts before they are divided, so a resample is another sum.

    Source: Papineni et al. 2002.
    """

    unit: ClassVar[str] = "fraction"
    against: str | None = None
    """A model of the run (`base`, `sft`, `champion`): the difference to it; null: the figure itself."""
    max_n: int = Field(4, ge=1, le=8)
    """Words of the longest n-gram."""

    def measure(self, evidence: Evidence, candidate: str, *, bootstrap: stats.Bootstrap) -> Interval:
        """Return the figure with its interval over prompts."""
        mine = self._columns(evidence, candidate)
        if self.against is None:
            return stats.interval(mine, self._bleu, bootstrap)
        theirs = self._columns(evidence, self.against)
        width = len(mine)
        return stats.interval(
            [*mine, *theirs], lambda columns: self._bleu(columns[:width]) - self._bleu(columns[width:]), bootstrap
        )

    def _columns(self, evidence: Evidence, model: str) -> list[list[float | None]]:
        """Return a row of figures a prompt: matches and n-grams of each order, lengths of answer and reference."""
        rows: list[list[float | None]] = []
        for row in evidence.models[model]:
            if not row.reference:
                rows.append([None] * (2 * self.max_n + 2))
                continue
            found = overlap(words(row.response), [words(row.reference)], max_n=self.max_n)
            rows.append([float(each) for each in (*found.matches, *found.ngrams, found.length, found.reference_length)])
        return [list(column) for column in zip(*rows, strict=True)]

    def _bleu(self, columns: Array) -> Array:
        sums = columns.sum(-1)
        matches, ngrams = sums[: self.max_n], sums[self.max_n : 2 * self.max_n]
        length, reference_length = sums[-2], sums[-1]
        logs = np.log(matches / np.maximum(ngrams, 1.0)).mean(0)  # a sum without a match: log 0, and BLEU 0
        result: Array = np.exp(np.minimum(0.0, 1.0 - reference_length / np.maximum(length, 1.0)) + logs)
        return result
