"""What recipes on fixed rows share: a data plan, one trained model, nothing to carry between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import RecipeState


class OfflineRows:
    """The rows of an offline recipe as forwards, and the empty answers to the rest of the contract."""

    def __init__(self, plan: DataPlan, layout: Layout) -> None:
        """Take the plan of rows and how they are laid out."""
        self.plan, self.layout = plan, layout
        self.num_steps = plan.num_steps

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Return the forwards of a step."""
        return self.layout.batches(self.plan.rows(step))

    def after_step(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Return no further figures."""
        return {}

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:
        """Check nothing: the guards of the loop are enough."""

    def state(self) -> RecipeState:
        """Return nothing: the rows are a function of (seed, step)."""
        return RecipeState({}, {})

    def load_state(self, state: RecipeState) -> None:
        """Take nothing back."""
        assert not state.tensors
        assert not state.values
