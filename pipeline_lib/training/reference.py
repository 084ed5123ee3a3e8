"""The reference model: the policy without its adapter, or a frozen copy where all weights train.

Without its adapter means as it was loaded: an SFT model, merged as it was saved, never its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import PreTrainedModel

from pipeline_lib.errors import IntegrityError
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


def require_same_weights(policy: Mapping[str, str], reference: Mapping[str, str]) -> None:
    """Refuse a reference that is another model than the one that the policy starts from.

    Args:
        policy: Sha256 of every weight and configuration file of the model that is trained, by name.
        reference: The same of the model that the reference's log-probabilities were taken from.

    Raises:
        IntegrityError: A file differs, or only one of the models has it.
    """
    differing = sorted(name for name in policy.keys() | reference.keys() if policy.get(name) != reference.get(name))
    if differing:
        raise IntegrityError(
            f"the reference is not the model that the policy starts from: {', '.join(differing[:3])} "
            f"{'is' if len(differing) == 1 else 'are'} not the same",
            next_step="take both from one SFT artifact: run the stage reference_logps again on it",
        )
