"""Value function and reward model over one frozen backbone, which can be the policy's.

With adapters, the reward is the backbone without them and the value the backbone with them, and
each has its own head; both start from the reward model, so at first the value of a token is the
score that its text would get. Where the reward model was itself trained as an adapter on the weights
that the policy starts from, policy, reference, reward model and value function are one backbone:
with the policy's adapter, with none, with the reward model's, and with that and the value function's.
Without adapters the value function is a second, fully trained copy.
The value can also start as 0 everywhere: its head's weights are then 0, and it has no gain and bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.models.adapters import without_adapter
from pipeline_lib.models.heads import head_of, load_scalar_model, run_scalar
from pipeline_lib.models.precision import default_device
from pipeline_lib.models.shared_base import StoredAdapter, add_trained_adapter, only_adapters, put_adapter
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, dtype_for, prepare

ValueInit = Literal["reward_model", "zero"]
ScoreT = TypeVar("ScoreT", float, Tensor)
REWARD, VALUE = "reward_model", "value_function"
"""Names of the critic's adapters on the policy's base; further reward models are REWARD_<number>."""


@dataclass(frozen=True)
class Normalization:
    """`normalised = gain * raw + bias`, so that scores of the reference policy are about N(0, 1)."""

    gain: float = 1.0
    bias: float = 0.0

    def __call__(self, raw: ScoreT) -> ScoreT:
        """Normalise a raw score, or raw scores of any shape."""
        return raw * self.gain + self.bias


class FrozenRewardModel:
    """A reward model that only scores, on a base of its own or on the policy's."""

    def __init__(self, directory: Path, normalization: Normalization, *, settings: TrainingSettings) -> None:
        """Load a reward model's folder.

        Args:
            directory: The reward model's files.
            normalization: Its gain and bias.
            settings: Precision.
        """
        model = load_scalar_model(directory, dtype=dtype_for(settings)).to(default_device())
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.head_1D: Tensor = head_of(self.model).weight
        self.normalization = normalization
        self._on: tuple[PeftModel, str] | None = None

    @classmethod
    def on_policy(cls, policy: TrainedModel, stored: StoredAdapter, normalization: Normalization) -> FrozenRewardModel:
        """Put a reward model on the policy's own base, as a frozen adapter beside those that are there.

        Args:
            policy: With a LoRA adapter, on the weights that the reward model was trained on.
            stored: The reward model's adapter and head.
            normalization: Its gain and bias.

        Raises:
            IntegrityError: The adapter does not go on the policy's layers.
        """
        assert isinstance(policy.adapter, PeftModel), "only adapters share a base"
        made = cls.__new__(cls)
        name = f"{REWARD}_{len(policy.adapter.peft_config)}"
        put_adapter(policy.adapter, name, stored)
        made.model, made.normalization = policy.model, normalization
        made.head_1D = stored.head_1D.detach().float().clone().to(policy.model.device)
        made._on = policy.adapter, name
        return made

    @property
    def is_on_policy(self) -> bool:
        """True where the policy's base is this model's too."""
        return self._on is not None

    @property
    def is_packed(self) -> bool:
        """True where the model takes prompt trees."""
        return supports_trees(self.model)

    def scores(self, batch: TreeBatch) -> Tensor:
        """Score each response at its last token, `(R,)`, normalised."""
        return self.normalization(self.raw_scores(batch))

    @torch.no_grad()
    def raw_scores(self, batch: TreeBatch) -> Tensor:
        """Score each response as the head does, `(R,)`; on the policy's base, the policy is silent meanwhile."""
        with nullcontext() if self._on is None else only_adapters(*self._on):
            return run_scalar(self.model, batch, self.head_1D, batch.last_R)


class Critic:
    """Scores whole responses and values their tokens, in normalised reward units."""

    def __init__(
        self,
        directory: Path,
        settings: TrainingSettings,
        normalization: Normalization,
        *,
        seed: int,
        value_init: ValueInit = "reward_model",
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
        self.reward_model = self.value.model
        if self.value.adapter is None:
            self.reward_model = load_scalar_model(directory, dtype=dtype).to(self.value.model.device).eval()
            self.reward_model.requires_grad_(requires_grad=False)
            head_of(self.value.model).requires_grad_(requires_grad=False)
        self._set_heads(head_of(self.value.model).weight, normalization, value_init)

    @classmethod
    def on_policy(
        cls,
        policy: TrainedModel,
        stored: StoredAdapter,
        normalization: Normalization,
        *,
        seed: int,
        value_init: ValueInit = "reward_model",
    ) -> Critic:
        """Put reward model and value function on the policy's own base, as adapters: no weight is held twice.

        The value function speaks through the reward model's adapter and its own, which alone is trained:
        it is the function that it would be on a merged reward model.

        Args:
            policy: With a LoRA adapter, on the weights that the reward model was trained on.
            stored: The reward model's adapter and head.
            normalization: The reward model's gain and bias.
            seed: Seed of the value function's adapter.
            value_init: Whether values start as the reward model's scores or as 0.

        Raises:
            IntegrityError: The adapter does not go on the policy's layers.
        """
        assert isinstance(policy.adapter, PeftModel), "only adapters share a base"
        critic = cls.__new__(cls)
        put_adapter(policy.adapter, REWARD, stored)
        add_trained_adapter(policy.adapter, VALUE, seed=seed)
        critic.value = replace(policy, adapter_name=VALUE)
        critic.reward_model = policy.model
        critic._set_heads(stored.head_1D.to(policy.model.device), normalization, value_init)
        return critic

    def _set_heads(self, head_1D: Tensor, normalization: Normalization, value_init: ValueInit) -> None:
        self.reward_head_1D = head_1D.detach().float().clone().to(self.value.model.device)
        self.value_init = value_init
        starts_at_zero = value_init == "zero"
        value_head_1D = torch.zeros_like(self.reward_head_1D) if starts_at_zero else self.reward_head_1D.clone()
        self.value_head_1D = nn.Parameter(value_head_1D)
        self.normalization = normalization

    @property
    def is_on_policy(self) -> bool:
        """True where the policy's base is the critic's too."""
        return self.value.adapter_name == VALUE

    @property
    def is_packed(self) -> bool:
        """True where both take prompt trees."""
        return self.value.is_packed

    def group(self, *, learning_rate: float) -> ParameterGroup:
        """Return the value function's parameters."""
        trained = self.value.group("value", learning_rate=learning_rate)
        return ParameterGroup("value", {**trained.parameters, "value_head": self.value_head_1D}, learning_rate)

    @contextmanager
    def valuing(self) -> Iterator[PreTrainedModel]:
        """Yield the value function's backbone; on the policy's base, the policy is not to be used inside.

        A backward pass that computes activations again must run inside too.
        """
        with self._speaking(REWARD, VALUE):
            yield self.value.model

    def values(self, batch: TreeBatch) -> Tensor:
        """Value the state before each counted token, `(N,)`."""
        with self.valuing() as model:
            raw_N = run_scalar(model, batch, self.value_head_1D, batch.source_N)
        return raw_N if self.value_init == "zero" else self.normalization(raw_N)

    def scores(self, batch: TreeBatch) -> Tensor:
        """Score each response at its last token, `(R,)`."""
        return self.normalization(self.raw_scores(batch))

    @torch.no_grad()
    def raw_scores(self, batch: TreeBatch) -> Tensor:
        """Score each response as the reward model's head does, `(R,)`."""
        with self._speaking(REWARD) if self.is_on_policy else without_adapter(self.value.adapter):
            return run_scalar(self.reward_model, batch, self.reward_head_1D, batch.last_R)

    @contextmanager
    def _speaking(self, *names: str) -> Iterator[None]:
        """Switch the policy's base to some adapters, where it is the critic's too."""
        if not self.is_on_policy:
            yield
            return
        assert isinstance(self.value.adapter, PeftModel)
        with only_adapters(self.value.adapter, *names):
            yield
