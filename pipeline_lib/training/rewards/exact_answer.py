"""The right answer, as the row's own answer has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Literal

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen

Extract = Literal["number", "hashes", "whole"]

# A minus after a letter, a digit or a bracket is a hyphen or a subtraction.
_NUMBER = re.compile(r"((?<![\w)])-)?\$?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_HASHES = re.compile(r"####[ \t]*([^\n]*)")


class ExactAnswer(Frozen):
    """1 where the response's answer is that of the row's own answer, else 0; none where the row has no answer.

    Source: Cobbe et al. 2021 (arXiv 2110.14168), whose answers stand after `####`.
    """

    extract: Extract = "number"
    """number: what stands after the last `####`, else the last number; hashes: only what stands after
    `####`; whole: the whole text, case, white space and a last full stop aside."""
    right: float = 1.0
    """What the right answer earns."""
    wrong: float = 0.0
    """What another one earns, or none."""

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the right or the wrong answer's number for each response."""
        return [self._of(sample, resources.on_problem) for sample in samples]

    def _of(self, sample: Sample, on_problem: Callable[[Sample, str], None]) -> float | None:
        # A reference may be an answer alone, e.g. "42", with no mark in front of it.
        expected = answer_in(sample.reference, "whole" if self.extract == "whole" else "number")
        if not expected:
            on_problem(sample, f"its row has no answer to compare with ({self.extract})")
            return None
        return self.right if answer_in(sample.response, self.extract) == expected else self.wrong


def answer_in(text: str, extract: Extract) -> str | None:
    """Return the answer that a text comes to, in a form that equal answers share; None where there is none.

    Args:
        text: A worked answer.
        extract: See `ExactAnswer`. Numbers lose their `$`, commas and trailing zeros: `$1,200.50` is 1200.5.
    """
    if extract == "whole":
        return " ".join(text.casefold().split()).removesuffix(".").rstrip() or None
    marked = _HASHES.findall(text)
    if marked:
        return _number_in(marked[-1]) or answer_in(marked[-1], "whole")
    return None if extract == "hashes" else _number_in(text)


def _number_in(text: str) -> str | None:
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, digits = found[-1]
    # Decimal drops leading zeros and keeps every digit, which float would not.
    plain = format(Decimal(digits.replace(",", "")), "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return plain if plain == "0" else sign + plain
