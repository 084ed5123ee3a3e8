"""A form that a program, or a person, can read on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen

_FENCE = re.compile(r"```[a-zA-Z]*\n(.*)\n```", re.DOTALL)
_BULLET = re.compile(r"[-*\u2022] +\S|\d{1,3}[.)] +\S")


class Format(Frozen):
    """1 where the whole response has the form, else 0."""

    form: Literal["json", "json_object", "bullets"] = "json"
    """json: any JSON value; json_object: an object; bullets: every line begins with -, *, • or a number."""
    keys: tuple[str, ...] = ()
    """Keys that the JSON object must have."""
    fenced: bool = False
    """True: the JSON may stand between ``` marks."""

    @model_validator(mode="after")
    def _keys_are_of_an_object(self) -> Self:
        if self.keys and self.form != "json_object":
            raise ValueError(f"keys are those of form: json_object, not of {self.form}")
        return self

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:  # noqa: ARG002
        """Return 1 or 0 for each response."""
        return [float(self._has_form(sample.response.strip())) for sample in samples]

    def _has_form(self, text: str) -> bool:
        if self.form == "bullets":
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return bool(lines) and all(_BULLET.match(line) for line in lines)
        fence = _FENCE.fullmatch(text) if self.fenced else None
        try:
            # NaN and Infinity are Python's own and no JSON.
            value = json.loads(fence.group(1) if fence else text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        if self.form == "json":
            return True
        return isinstance(value, dict) and value.keys() >= set(self.keys)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
