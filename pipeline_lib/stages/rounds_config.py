"""Candidates that are trained in rounds on responses they sampled: a chain of cached stages each.

Every round samples and scores (stage `rollouts`), then trains (`sft` on the best responses, or
`preference` on the ranked ones). The flow carries the chain out; each link is a stage of its own,
so a candidate that is killed goes on in the round where it was.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.models.settings import AdapterSettings, LoraSettings
from pipeline_lib.registry import PluginSpec
from pipeline_lib.stages.labels import JudgeLabels, Labels, LabelsConfig, PeopleLabels, RewardModelLabels
from pipeline_lib.stages.names import Name
from pipeline_lib.stages.preference import PreferenceConfig
from pipeline_lib.stages.rollout_rows import Compared, Selection
from pipeline_lib.stages.rollouts import RolloutsConfig, RolloutSettings
from pipeline_lib.stages.sft import SftConfig
from pipeline_lib.training.settings import OfflineSettings

Temperature = Annotated[float, Field(ge=0)]


class RoundsSettings(OfflineSettings):
    """Training in rounds; the settings of training are those of each round."""

    rounds: int = Field(3, ge=1)
    """Rounds of sampling and training."""
    sampling: RolloutSettings = Field(RolloutSettings(), title="Sampling")
    """How responses are sampled in each round."""
    temperatures: tuple[Temperature, ...] = Field((1.0,), min_length=1)
    """Sampling temperature of each round; the last one holds for all further rounds."""
    start_from: Name = "sft"
    """The model of the first round: `sft`, `base`, or another candidate by name."""
    max_truncated_frac: float = Field(1.0, ge=0, le=1)
    """Share of responses without an end, at most: those that the model did not end within `sampling.max_new_tokens`."""
    labels: Labels = Field(RewardModelLabels(), title="Labels")
    """Who says in each round which response is better: the reward model, a judge, or people."""

    def rollouts(self, number: int) -> RolloutsConfig:
        """Return how round `number`, counted from 1, samples and what it makes of the samples."""
        temperature = self.temperatures[min(number, len(self.temperatures)) - 1]
        return RolloutsConfig(
            **self.sampling.model_dump(), temperature=temperature, round=number, precision=self.precision,
            max_prompt_tokens=self.max_prompt_tokens, seed=self.seed, **self._rows(),
        )  # fmt: skip

    def labelling(self, round_name: str) -> LabelsConfig | None:
        """Return how the responses of a round are labelled; None where their scores decide.

        Args:
            round_name: Name of the file that people label: no other round's, no other samples'.
        """
        if isinstance(self.labels, RewardModelLabels):
            return None
        file = f"{self.labels.directory}/{round_name}.jsonl" if isinstance(self.labels, PeopleLabels) else ""
        return LabelsConfig(labels=self.labels, file=file, **self._rows())

    def _rows(self) -> dict[str, Any]:
        """Return the settings of stages `rollouts` and `labels` that are the method's own."""
        return {}

    def _training(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OfflineSettings.model_fields}


class RejectionSettings(RoundsSettings):
    """Fine-tuning on the best of a model's own responses."""

    keep: Literal["round", "all"] = "round"
    """Choose among this round's responses, or among those of all rounds so far, as LLaMA-2 does."""
    select: Selection = "best_of_prompt"
    """Train on the best response of each prompt, or on the best share of all responses."""
    top_frac: float = Field(0.2, gt=0, le=1)
    """The share, of `top_share`."""
    train_from: Literal["previous", "start"] = "previous"
    """Each round trains the model of the round before, or anew the one that the first round began with."""

    @model_validator(mode="after")
    def _compares_across_prompts(self) -> Self:
        is_rated = isinstance(self.labels, RewardModelLabels) or (
            isinstance(self.labels, JudgeLabels) and self.labels.form == "rate"
        )
        if self.select == "top_share" and not is_rated:
            raise ValueError(
                "select: top_share orders the responses of all prompts, and these labels order those of one prompt "
                "alone; take labels: {name: judge, form: rate, ...} or select: best_of_prompt"
            )
        return self

    def sft(self) -> SftConfig:
        """Return how a round trains: earlier turns of a prompt are not the model's own, so they do not count."""
        return SftConfig(**self._training(), train_on="last_assistant_turn")

    def _rows(self) -> dict[str, Any]:
        return {"select": self.select, "top_frac": self.top_frac}


class RaftConfig(RejectionSettings):
    """RAFT and LLaMA-2's rejection sampling: K samples a prompt, SFT on the best, again and again."""

    method: Literal["raft"] = "raft"
    """The method of this candidate."""


class BestOfNConfig(RejectionSettings):
    """Best-of-n into the weights: one round with many samples."""

    method: Literal["best_of_n"] = "best_of_n"
    """The method of this candidate."""
    rounds: int = Field(1, ge=1, le=1)
    """One round."""
    sampling: RolloutSettings = Field(RolloutSettings(samples_per_prompt=16), title="Sampling")
    """How responses are sampled; `samples_per_prompt` is n."""


class SdfConfig(RejectionSettings):
    """Baize's self-distillation with feedback: the best of four samples trains a new adapter on the SFT model's.

    Baize lets a language model say which is best: `labels: {name: judge, form: rate, scale: 1-100, ...}`.
    """

    method: Literal["sdf"] = "sdf"
    """The method of this candidate."""
    rounds: int = Field(1, ge=1, le=1)
    """One round."""
    sampling: RolloutSettings = Field(RolloutSettings(samples_per_prompt=4, top_p=0.95), title="Sampling")
    """How responses are sampled in each round."""
    adapter: AdapterSettings | None = Field(LoraSettings(rank=8, alpha=16, dropout=0.05), title="Adapter")
    """The new adapter; that of the SFT model is in its weights already: h = W0 x + B_sft A_sft x + B_sdf A_sdf x."""

    @model_validator(mode="after")
    def _has_adapter(self) -> Self:
        if self.adapter is None:
            raise ValueError("adapter is null: self-distillation with feedback trains a new adapter; take method: raft")
        return self


class IteratedDpoConfig(RoundsSettings):
    """Iterated DPO: the present model's own responses, ranked by the reward model, a judge or people, are its pairs.

    The reference of a round is the model that the round begins with.
    """

    method: Literal["iterated_dpo"] = "iterated_dpo"
    """The method of this candidate."""
    loss: Annotated[PluginSpec, AfterValidator(PREFERENCE_LOSSES.complete)] = Field(
        {"name": "dpo"}, validate_default=True
    )
    """The objective and its parameters, any of `prefline list losses`."""
    compared: Compared = "best_and_worst"
    """Compare the best response of a prompt with the worst, or all of them."""

    def preference(self) -> PreferenceConfig:
        """Return how a round trains."""
        return PreferenceConfig(**self._training(), loss=self.loss)

    def _rows(self) -> dict[str, Any]:
        return {"compared": self.compared}

    @model_validator(mode="after")
    def _has_two_responses(self) -> Self:
        if self.sampling.samples_per_prompt < 2:
            raise ValueError("sampling.samples_per_prompt = 1: two or more responses can be compared")
        return self
