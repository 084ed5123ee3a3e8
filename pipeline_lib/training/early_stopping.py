"""Early stopping: measure held-out rows now and then, keep the best weights, stop where none gets better.

The best are those of the lowest held-out loss, or of the highest score where the weights are scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import EarlyStoppingSettings


class EarlyStopping:
    """The best measurement so far and the weights that had it; all of it is in a checkpoint."""

    def __init__(self, groups: Sequence[ParameterGroup], settings: EarlyStoppingSettings) -> None:
        """Start without any measurement."""
        self.groups, self.settings = list(groups), settings
        self.best_loss = math.inf
        """The lowest held-out loss; of scores, the highest with its sign turned."""
        self.is_by_score = False
        self.best_step = -1
        self.num_worse = 0
        self.best: dict[str, Tensor] = {}

    def is_due(self, step: int, num_steps: int) -> bool:
        """Tell whether the weights after a step are to be measured; the last step's always are."""
        return (step + 1) % self.settings.every_steps == 0 or step + 1 == num_steps

    @property
    def has_ended(self) -> bool:
        """True once `patience` measurements in a row were no better."""
        return self.num_worse >= self.settings.patience

    @property
    def outcome(self) -> str:
        """Which step's weights are kept, and why, in words."""
        figure = f"score {-self.best_loss:.4f}" if self.is_by_score else f"loss {self.best_loss:.4f}"
        return f"kept step {self.best_step + 1}, held-out {figure}"

    @torch.no_grad()
    def record(self, step: int, held_out_loss: float, *, score: float | None = None) -> None:
        """Take a measurement in; not finite counts as worse.

        Args:
            step: Whose weights were measured.
            held_out_loss: Lower is better; decides where there is no score.
            score: Higher is better; at every measurement or at none.
        """
        self.is_by_score = score is not None
        measured = held_out_loss if score is None else -score
        if not measured < self.best_loss - self.settings.min_gain:
            self.num_worse += 1
            return
        self.best_loss, self.best_step, self.num_worse = measured, step, 0
        self.best = {key: parameter.detach().clone() for key, parameter in self._parameters()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights back, where there are any."""
        for key, parameter in self._parameters():
            if key in self.best:
                parameter.copy_(self.best[key])

    def counters(self) -> dict[str, float | int]:
        """Return what a checkpoint holds besides the best weights."""
        best = self.best_loss if math.isfinite(self.best_loss) else -1.0
        return {
            "best_loss": best, "best_step": self.best_step, "num_worse": self.num_worse,
            "is_by_score": int(self.is_by_score),
        }  # fmt: skip

    def load(self, counters: dict[str, float | int], best: dict[str, Tensor]) -> None:
        """Take a checkpoint's state back."""
        self.best_step, self.num_worse = int(counters["best_step"]), int(counters["num_worse"])
        self.is_by_score = bool(counters.get("is_by_score", 0))
        self.best_loss = float(counters["best_loss"]) if self.best_step >= 0 else math.inf
        self.best = {
            key: best[key].to(parameter.device) for key, parameter in self._parameters() if key in best
        }  # on the parameters' device

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (f"{group.name}/{name}", parameter) for group in self.groups for name, parameter in group.parameters.items()
        ]
