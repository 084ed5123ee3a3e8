"""Words to say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen


class Words(Frozen):
    """The share of the given words that the response says, case aside."""

    words: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(min_length=1)
    """Words or phrases; each counts once, and only as a whole word."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:  # noqa: ARG002
        """Return the share of the words that each response says."""
        patterns = [re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE) for word in self.words]
        return [sum(bool(one.search(sample.response)) for one in patterns) / len(patterns) for sample in samples]
