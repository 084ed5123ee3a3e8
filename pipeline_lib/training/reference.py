"""The reference model: the policy without its adapter, or a frozen copy where all weights train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from pipeline_lib.models.adapters import without_adapter
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.training.trained_model import TrainedModel


@dataclass(frozen=True)
class Reference:
    """Gives the reference model for the length of a `with` block."""

    policy: TrainedModel
    frozen: PreTrainedModel | None

    @classmethod
    def of(cls, policy: TrainedModel) -> Reference:
        """Share the policy's frozen base, or load a copy where the base is being trained."""
        if policy.adapter is not None:
            return cls(policy, None)
        copy = load_causal_model(policy.directory, dtype=policy.model.dtype).to(policy.model.device)
        return cls(policy, copy.requires_grad_(requires_grad=False))

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """Yield the reference; the policy is not to be used inside."""
        if self.frozen is not None:
            yield self.frozen
            return
        with without_adapter(self.policy.adapter):
            yield self.policy.model
