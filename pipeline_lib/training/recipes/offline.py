"""What recipes on fixed rows share: a data plan, one trained model, nothing to carry between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from pipeline_lib.models.adapters import in_evaluation_mode
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.forward import training_forward
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import ParameterGroup, RecipeState, StepLoss
from pipeline_lib.training.settings import OfflineSettings
from pipeline_lib.training.trained_model import TrainedModel


class OfflineRows(ABC):
    """The rows of an offline recipe as forwards, and the plain answers to the rest of the contract."""

    def __init__(self, trained: TrainedModel, plan: DataPlan, layout: Layout) -> None:
        """Take the model that is trained, the plan of rows and how they are laid out."""
        self.trained, self.plan, self.layout = trained, plan, layout
        self.num_steps = plan.num_steps

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the trained model's parameters."""
        return [self.trained.group("policy", learning_rate=self.plan.settings.optimizer.learning_rate)]

    @property
    def settings(self) -> OfflineSettings:
        """The stage's settings."""
        assert isinstance(self.plan.settings, OfflineSettings)
        return self.plan.settings

    @abstractmethod
    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the loss of one forward (see `training.recipe.Recipe`)."""

    def training_forward(self, batch: TreeBatch) -> AbstractContextManager[None]:
        """Return the context of a forward that is trained on."""
        return training_forward(
            [self.trained.model], batch,
            gradient_checkpointing=self.settings.gradient_checkpointing, neftune_alpha=self.settings.neftune_alpha,
        )  # fmt: skip

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Return the loss of all held-out rows as if they were one step."""
        if not self.plan.held_out:
            return None
        batches = [batch.to(self.trained.model.device) for batch in self.layout.batches(self.plan.held_out)]
        with in_evaluation_mode(self.trained.model):
            return sum(float(self.loss(batch, batches).loss) for batch in batches)

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Return the forwards of a step."""
        return self.layout.batches(self.plan.rows(step))

    def after_step(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Return no further figures."""
        return {}

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:  # noqa: B027
        """Check nothing: the guards of the loop are enough."""

    def state(self) -> RecipeState:
        """Return nothing: the rows are a function of (seed, step)."""
        return RecipeState({}, {})

    def load_state(self, state: RecipeState) -> None:
        """Take nothing back."""
        assert not state.tensors
        assert not state.values
