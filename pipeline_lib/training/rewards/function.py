"""A Python function of one's own, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from pipeline_lib.errors import ConfigError
from pipeline_lib.hashing import sha256_file
from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.training.rewards.isolated import Isolated
from pipeline_lib.validation import Frozen

ALLOWED_VARIABLE = "PREFLINE_REWARD_FUNCTIONS"
"""Modules, or `module:function`, that configurations may name, with commas between them."""


class Function(Frozen):
    """What `function(rows, **parameters)` returns: a list with one number, or None, for each row.

    A row is a dictionary with `id`, `prompt` (a list of `{role, content}`), `response`, `is_finished`,
    `tags` and `reference`. The function is imported in a process of its own, and only where the operator
    allows it: a configuration may come out of a form in a browser.
    """

    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`package.module:function`; it, or its module, is on the list in `PREFLINE_REWARD_FUNCTIONS`."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed on by name."""
    timeout_s: float = Field(30.0, gt=0, le=3600)
    """Seconds that a call on all rows, or on one, may take before it counts as hung."""

    def fingerprints(self) -> Mapping[str, str]:
        """Return the sha256 of the module's file, so that another text is another result.

        Raises:
            ConfigError: The function is not allowed, or its module cannot be found.
        """
        self._require_allowed()
        return {self._module: sha256_file(self._file())}

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return what the function says of each response.

        Raises:
            ConfigError: The function is not allowed.
            RewardError: It cannot be loaded, or returns the wrong count.
        """
        self._require_allowed()
        parameters: dict[str, Any] = dict(self.parameters)
        return Isolated(self.function, parameters, self.timeout_s).score(samples, resources)

    @property
    def _module(self) -> str:
        return self.function.partition(":")[0]

    def _require_allowed(self) -> None:
        allowed = {place.strip() for place in os.environ.get(ALLOWED_VARIABLE, "").split(",")}
        if not allowed & {self.function, self._module}:
            raise ConfigError(
                f"the reward function {self.function!r} is not on the list of allowed ones",
                next_step=f"who runs the pipeline allows it: export {ALLOWED_VARIABLE}={self._module}",
            )

    def _file(self) -> Path:
        # A package is imported on the way to its module; nothing else is.
        try:
            spec = importlib.util.find_spec(self._module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            raise ConfigError(
                f"the module {self._module!r} of a reward function is not found",
                next_step="install it, or run where it can be imported from",
            )
        return Path(spec.origin)
