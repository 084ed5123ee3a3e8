"""Configuration shared by every training stage. Light: imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.models.settings import AdapterSettings, LoraSettings, Precision
from pipeline_lib.validation import Frozen


class OptimizerSettings(Frozen):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adafactor", "rmsprop", "adamw_8bit"] = "adamw"
    """adamw_8bit needs CUDA and bitsandbytes; adafactor keeps no first moment."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's moment averages."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; linear falls to 0, cosine to `final_frac`."""
    warmup_frac: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from 0."""
    final_frac: float = Field(0.1, ge=0, le=1)
    """Share of the peak at which the cosine ends."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""


class TrainingSettings(Frozen):
    """What every training stage has."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"lora": "'adapter' (name: lora; null trains every weight)"}

    max_rows: int | None = Field(None, ge=1)
    """Use at most this many rows, chosen by the seed."""
    batch_size: int = Field(16, ge=1)
    """Rows of one optimizer step."""
    tokens_per_batch: int = Field(1024, ge=16)
    """Tokens of one forward, at most; a step is as many forwards as its rows need."""
    max_prompt_tokens: int = Field(512, ge=8)
    """Longer prompts lose their beginning."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer and its schedule."""
    adapter: AdapterSettings | None = Field(LoraSettings(), title="Adapter")
    """Which few weights are trained, by default LoRA's; null trains every weight."""
    precision: Precision = "auto"
    """bf16 where the processor multiplies it fast, else fp32; trained weights are always fp32."""
    gradient_checkpointing: bool = False
    """Keep the activations of layer borders only and compute the others again: less memory, more time."""
    ema_decay: float | None = Field(None, gt=0, lt=1, title="EMA decay")
    """The result is the moving average of the weights with this decay; null: the last weights."""
    seed: int = Field(0, ge=0)
    """Seed of the data order, the adapters and every sample."""


class EarlyStoppingSettings(Frozen):
    """Stop where held-out rows no longer gain; the best weights are the result."""

    held_out_frac: float = Field(0.1, gt=0, lt=1)
    """Share of the stage's own rows that is measured on and not trained on, chosen by the seed."""
    every_steps: int = Field(10, ge=1)
    """Optimizer steps between two measurements; the last step is always measured."""
    patience: int = Field(3, ge=1)
    """Measurements in a row without a gain after which training ends."""
    min_gain: float = Field(0.0, ge=0)
    """A loss counts as better where it is lower by more than this."""


class OfflineSettings(TrainingSettings):
    """What training on fixed rows has besides."""

    epochs: int = Field(1, ge=1)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever the epochs."""
    max_response_tokens: int = Field(512, ge=4)
    """Longer responses are cut, and then carry no end-of-turn token."""
    neftune_alpha: float | None = Field(None, gt=0, title="NEFTune alpha")
    """Noise on the input embeddings while training, uniform within alpha / sqrt(tokens * width); null: none."""
    early_stopping: EarlyStoppingSettings | None = None
    """Stop early on held-out rows; null: train all steps."""


class PpoSettings(TrainingSettings):
    """Proximal policy optimisation against a reward model (methods 2.4 and 3)."""

    iterations: int = Field(20, ge=1)
    """Rounds of sampling and updating."""
    batch_size: int = Field(64, ge=2)
    """Rollouts of one iteration, one a prompt."""
    minibatches: int = Field(2, ge=1)
    """Optimizer steps that one pass over an iteration's rollouts is split into."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over an iteration's rollouts."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a sampled response, at most."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities in the ratio are taken at it too."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty at the start."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL from policy to reference that is subtracted from the reward."""
    kl_target_nats: float | None = Field(6.0, gt=0, title="KL target")
    """Target of the adaptive controller, nats a response; null keeps the weight fixed."""
    kl_horizon_responses: float = Field(10_000, gt=0)
    """Responses over which the controller corrects."""
    max_kl_nats: float = Field(50.0, gt=0)
    """Stop when the mean KL of an iteration's responses exceeds this."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """0 gives one-step temporal differences, 1 Monte-Carlo returns."""
    clip_range: float = Field(0.2, gt=0)
    """The ratio of the policy loss is clipped to 1 -+ this."""
    value_clip_range: float = Field(0.2, gt=0)
    """New values are clipped to the old ones -+ this."""
    value_coef: float = Field(0.1, ge=0)
    """Weight of the value loss."""
    value_learning_rate: float | None = Field(None, gt=0, title="Value learning rate")
    """Null: that of the policy."""
    whiten_rewards: bool = False
    """Scale each minibatch's rewards to unit variance, keeping their mean."""
    whiten_advantages: bool = True
    """Shift and scale each minibatch's advantages to mean 0 and unit variance."""
    missing_eos: Literal["keep", "replace", "penalty"] = "replace"
    """What happens to the score of a response that did not end by itself."""
    missing_eos_value: float = -1.0
    """The score that replaces it, or what is added to it."""

    @model_validator(mode="after")
    def _has_no_dropout(self) -> Self:
        # The ratio compares one model with itself some steps ago: with dropout it is noise from the start.
        if getattr(self.adapter, "dropout", 0.0) > 0:
            raise ValueError("adapter.dropout must be 0: PPO's log-probabilities are those of one network")
        return self

    @model_validator(mode="after")
    def _minibatches_have_rollouts(self) -> Self:
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches = {self.minibatches} is more than batch_size = {self.batch_size}")
        return self
