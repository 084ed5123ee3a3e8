"""An ending to come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen


class EndsWith(Frozen):
    """1 where the response ends with one of the endings, else 0."""

    endings: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field((".", "!", "?"), min_length=1)
    """Endings that earn 1; white space after them does not count."""
    only_finished: bool = False
    """True: a response that was cut at the token limit earns 0 whatever its last character."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:  # noqa: ARG002
        """Return 1 or 0 for each response."""
        return [float(self._earns(sample)) for sample in samples]

    def _earns(self, sample: Sample) -> bool:
        return sample.response.rstrip().endswith(self.endings) and (sample.is_finished or not self.only_finished)
