"""Value function and reward model over one frozen backbone.

With adapters, the reward is the backbone without them and the value the backbone with them, and
each has its own head; both start from the reward model, so at first the value of a token is the
score that its text would get. Without adapters the value function is a second, fully trained copy.
The value can also start as 0 everywhere: its head's weights are then 0, and it has no gain and bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline_lib.models.adapters import without_adapter
from pipeline_lib.models.backbone import hidden_states
from pipeline_lib.models.heads import head_of, load_scalar_model, scalar_at
from pipeline_lib.models.precision import default_device
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import TrainingSettings
from pipeline_lib.training.trained_model import dtype_for, prepare


@dataclass(frozen=True)
class Normalization:
    """`normalised = gain * raw + bias`, so that scores of the reference policy are about N(0, 1)."""

    gain: float = 1.0
    bias: float = 0.0

    def __call__(self, raw: Tensor) -> Tensor:
        """Normalise raw scores of any shape."""
        return raw * self.gain + self.bias


class FrozenRewardModel:
    """A further reward model that only scores, e.g. one that no policy is trained against."""

    def __init__(self, directory: Path, normalization: Normalization, *, settings: TrainingSettings) -> None:
        """Load a reward model's folder.

        Args:
            directory: The reward model's files.
            normalization: Its gain and bias.
            settings: Precision.
        """
        model = load_scalar_model(directory, dtype=dtype_for(settings)).to(default_device())
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.normalization = normalization

    def scores(self, batch: TreeBatch) -> Tensor:
        """Score each response at its last token, `(R,)`, normalised."""
        return self.normalization(self.raw_scores(batch))

    @torch.no_grad()
    def raw_scores(self, batch: TreeBatch) -> Tensor:
        """Score each response as the head does, `(R,)`."""
        hidden_PD = hidden_states(self.model, batch)
        return scalar_at(hidden_PD, head_of(self.model).weight, batch.last_R)


class Critic:
    """Scores whole responses and values their tokens, in normalised reward units."""

    def __init__(
        self,
        directory: Path,
        settings: TrainingSettings,
        normalization: Normalization,
        *,
        seed: int,
        value_init: Literal["reward_model", "zero"] = "reward_model",
    ) -> None:
        """Load a reward model's folder.

        Args:
            directory: The reward model's files.
            settings: Precision and adapters.
            normalization: The reward model's gain and bias.
            seed: Seed of the value function's adapters.
            value_init: Whether values start as the reward model's scores or as 0.
        """
        dtype = dtype_for(settings)
        model = load_scalar_model(directory, dtype=dtype)
        self.value = prepare(model, directory, settings, seed=seed)
        reward_head = head_of(self.value.model).weight.detach().float().clone()
        self.reward_head_1D = reward_head.to(self.value.model.device)
        self.value_init = value_init
        starts_at_zero = value_init == "zero"
        value_head_1D = torch.zeros_like(self.reward_head_1D) if starts_at_zero else self.reward_head_1D.clone()
        self.value_head_1D = nn.Parameter(value_head_1D)
        self.reward_model = self.value.model
        if self.value.adapter is None:
            self.reward_model = load_scalar_model(directory, dtype=dtype).to(self.value.model.device).eval()
            self.reward_model.requires_grad_(requires_grad=False)
            head_of(self.value.model).requires_grad_(requires_grad=False)
        self.normalization = normalization

    def group(self, *, learning_rate: float) -> ParameterGroup:
        """Return the value function's parameters."""
        trained = self.value.group("value", learning_rate=learning_rate)
        return ParameterGroup("value", {**trained.parameters, "value_head": self.value_head_1D}, learning_rate)

    def values(self, batch: TreeBatch) -> Tensor:
        """Value the state before each counted token, `(N,)`."""
        hidden_PD = hidden_states(self.value.model, batch)
        raw_N = scalar_at(hidden_PD, self.value_head_1D, batch.source_N)
        return raw_N if self.value_init == "zero" else self.normalization(raw_N)

    def scores(self, batch: TreeBatch) -> Tensor:
        """Score each response at its last token, `(R,)`."""
        return self.normalization(self.raw_scores(batch))

    @torch.no_grad()
    def raw_scores(self, batch: TreeBatch) -> Tensor:
        """Score each response as the reward model's head does, `(R,)`."""
        with without_adapter(self.value.adapter):
            hidden_PD = hidden_states(self.reward_model, batch)
        return scalar_at(hidden_PD, self.reward_head_1D, batch.last_R)
