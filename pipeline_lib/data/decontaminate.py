"""Keep what is measured out of what is trained on: no training row shares a long run of words with a held-out one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from pydantic import Field

from pipeline_lib.data.refusal import Refusal
from pipeline_lib.schema import Record, Split
from pipeline_lib.text.normalize import comparison_key
from pipeline_lib.validation import Frozen

HELD_OUT = frozenset({Split.REWARD_TEST, Split.GATE})
_WORD = re.compile(r"\w+")


class Decontamination(Frozen):
    """Refuse training rows that hold a run of words of a held-out row, in any turn or response.

    One split by prompt keeps equal prompts together, but not a text that is quoted under another prompt.

    Source: Brown et al. 2020 (arXiv 2005.14165), appendix C.
    """

    words: int = Field(13, ge=4, le=100)
    """Words of a run; case, marks and invisible characters do not count."""
    common_rows: int = Field(10, ge=1)
    """A run in more held-out rows than this is a common phrase, and counts for nothing."""


class HeldOutRuns:
    """The runs of words of all held-out rows."""

    def __init__(self, config: Decontamination) -> None:
        self.config = config
        self._rows_with: Counter[int] = Counter()

    def add(self, record: Record) -> None:
        """Take a held-out row's runs in."""
        self._rows_with.update({hash(run) for run in self._runs(record)})

    def refusal(self, record: Record) -> Refusal | None:
        """Refuse a training row that holds such a run; the reason quotes the first."""
        for run in self._runs(record):
            if 1 <= self._rows_with.get(hash(run), 0) <= self.config.common_rows:
                shared = " ".join(run)
                return Refusal("E_CONTAMINATED", f"it shares {len(run)} words with a held-out row: {shared}")
        return None

    def _runs(self, record: Record) -> Iterator[tuple[str, ...]]:
        size = self.config.words
        for text in (*(turn.content for turn in record.messages), *(answer.content for answer in record.responses)):
            words = _WORD.findall(comparison_key(text))
            for start in range(len(words) - size + 1):
                yield tuple(words[start : start + size])
