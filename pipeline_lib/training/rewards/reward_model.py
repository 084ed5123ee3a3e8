"""A reward model's score, normalised as in PPO, or as it comes out of the head."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from pipeline_lib.training.rewards.contract import Resources, Sample
from pipeline_lib.validation import Frozen


class RewardModel(Frozen):
    """The score of a reward model of the run, read at the response's last token."""

    model: str = Field("reward", min_length=1)
    """`reward` for the main one, else a name of `reward_models`."""
    normalized: bool = True
    """True: by the model's gain and bias, so that its scores have about mean 0 and deviation 1; false: raw."""

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The model that it asks."""
        return (self.model,)

    def score(self, samples: Sequence[Sample], resources: Resources) -> Sequence[float | None]:
        """Return the model's score of each response."""
        return resources.scores_of(self.model, [sample.tree for sample in samples], is_raw=not self.normalized)
