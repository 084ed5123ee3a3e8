"""A length to aim at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen


class Length(Frozen):
    """1 within the tolerance of the target; each unit beyond it costs 1 / target, down to 0."""

    target: int = Field(ge=1)
    """Length aimed at."""
    tolerance: int = Field(0, ge=0)
    """How far from the target still earns 1."""
    unit: Literal["tokens", "words", "characters"] = "words"
    """What is counted; tokens are the policy's, without the end-of-turn token."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:  # noqa: ARG002
        """Return 1 - (|length - target| - tolerance) / target within [0, 1]."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> float:
        excess = abs(self._length(sample) - self.target) - self.tolerance
        return min(1.0, max(0.0, 1 - excess / self.target))

    def _length(self, sample: Sample) -> int:
        match self.unit:
            case "tokens":
                return len(sample.tree.response_ids[0]) - sample.is_finished
            case "words":
                return len(sample.response.split())
            case "characters":
                return len(sample.response)
