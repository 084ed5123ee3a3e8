"""A regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.training.rewards.isolated import Isolated
from pipeline_lib.validation import Frozen


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


class Regex(Frozen):
    """One number where the pattern is found in the response, another where it is not.

    It is matched in a process of its own: some patterns take longer than anyone waits on some texts.
    """

    pattern: Annotated[str, AfterValidator(_compiles)] = Field(min_length=1)
    """Python's regular expressions; `(?i)` at its beginning leaves case aside, `(?s)` lets a dot match lines' ends."""
    whole: bool = False
    """True: it must match the whole response."""
    found: float = 1.0
    """What a match earns."""
    absent: float = 0.0
    """What a response without one earns."""
    timeout_s: float = Field(10.0, gt=0, le=3600)
    """Seconds that matching may take."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the number that each response earns."""
        search = Isolated("__main__:search", {"pattern": self.pattern, "whole": self.whole}, self.timeout_s)
        flags = search.score(samples, resources)
        return [None if flag is None else self.found if flag else self.absent for flag in flags]
