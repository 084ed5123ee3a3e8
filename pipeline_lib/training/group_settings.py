"""Configuration of RLOO and GRPO. Light: imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.generation import GeneratorSpec
from pipeline_lib.training.settings import BreakerSettings, TrainingSettings


class GroupSettings(TrainingSettings):
    """Policy gradient on several samples a prompt, each measured by the others; no value function."""

    iterations: int = Field(20, ge=1)
    """Rounds of sampling and updating."""
    batch_size: int = Field(16, ge=1)
    """Prompts of one iteration."""
    samples_per_prompt: int = Field(4, ge=2)
    """Samples of each prompt (k of RLOO, G of GRPO)."""
    minibatches: int = Field(1, ge=1)
    """Optimizer steps that one pass over an iteration's prompts is split into."""
    mu: int = Field(1, ge=1)
    """Passes over an iteration's samples, each in a new order."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a sampled response, at most."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities in the ratio are taken at it too."""
    generator: GeneratorSpec = Field({"name": "continuous"}, validate_default=True)
    """What samples the responses, with its parameters; `prefline list generators` prints them."""
    clip_range: float = Field(0.2, gt=0)
    """The ratio is clipped to 1 -+ this; at the first step of an iteration it is 1."""
    max_kl_nats: float = Field(50.0, gt=0)
    """Stop with an error when the mean KL of an iteration's responses exceeds this."""
    breaker: BreakerSettings | None = None
    """Limits that go back and then end the training, instead of an error; null: only `max_kl_nats`."""
    missing_eos: Literal["keep", "replace", "penalty"] = "replace"
    """What happens to the score of a response that did not end by itself."""
    missing_eos_value: float = -1.0
    """The score that replaces it, or what is added to it."""

    @model_validator(mode="after")
    def _has_no_dropout(self) -> Self:
        # The ratio compares one model with itself some steps ago: with dropout it is noise from the start.
        if getattr(self.adapter, "dropout", 0.0) > 0:
            raise ValueError("adapter.dropout must be 0: the log-probabilities are those of one network")
        return self

    @model_validator(mode="after")
    def _minibatches_have_prompts(self) -> Self:
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches = {self.minibatches} is more than batch_size = {self.batch_size}")
        return self


class RlooSettings(GroupSettings):
    """REINFORCE with a leave-one-out baseline; the KL is part of the reward (arXiv 2402.14740)."""

    beta: float = Field(0.05, ge=0)
    """Weight of a response's KL from the reference, which its score is reduced by."""


class GrpoSettings(GroupSettings):
    """Group relative policy optimisation; the KL is a term of the loss (arXiv 2402.03300)."""

    beta: float = Field(0.04, ge=0)
    """Weight of the KL from the reference (k3) at every token."""
    scale: Literal["std", "none"] = "std"
    """Advantages are divided by their group's standard deviation; none: Dr. GRPO."""
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"
    """Mean of the responses' means (the paper), mean over the step's tokens (DAPO), or sum over
    responses * `max_new_tokens` (Dr. GRPO): how much a token of a long response weighs."""
