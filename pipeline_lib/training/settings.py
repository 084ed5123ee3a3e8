"""Configuration shared by every training stage. Light: imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.generation import GeneratorSpec
from pipeline_lib.models.settings import AdapterSettings, LoraSettings, Precision
from pipeline_lib.training.pretraining_settings import PretrainingSettings
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
    epsilon_form: Literal["torch", "tensorflow"] = "torch"
    """tensorflow (AdamW only): added before the bias correction, which makes the first steps smaller."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; linear falls to 0, cosine to `final_frac`."""
    warmup_frac: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises linearly from `warmup_from_frac` of its peak."""
    min_warmup_steps: int = Field(0, ge=0)
    """The warm-up takes so many steps at least, however few its share is."""
    warmup_from_frac: float = Field(0.0, ge=0, lt=1)
    """Share of the peak at which the warm-up begins; InstructGPT's PPO takes 0.1."""
    final_frac: float = Field(0.1, ge=0, le=1)
    """Share of the peak at which the cosine ends."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""

    @model_validator(mode="after")
    def _has_an_epsilon_of_that_form(self) -> Self:
        if self.epsilon_form == "tensorflow" and self.name != "adamw":
            raise ValueError(f"epsilon_form: tensorflow is one of adamw, not of {self.name}")
        return self


class TrainingSettings(Frozen):
    """What every training stage has."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"lora": "'adapter' (name: lora; null trains every weight)"}

    max_rows: int | None = Field(None, ge=1)
    """Use at most this many rows, chosen by the seed."""
    batch_size: int = Field(16, ge=1)
    """Rows of one optimizer step."""
    tokens_per_batch: int = Field(512, ge=16)
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

    @property
    def model_precision(self) -> Precision:
        """The format that the model runs in: fp32 where every weight is trained, else as configured."""
        return "fp32" if self.adapter is None else self.precision


class EarlyStoppingSettings(Frozen):
    """Stop where held-out rows no longer gain; the best weights are the result."""

    held_out_frac: float = Field(0.1, gt=0, lt=1)
    """Share of the stage's own rows that is measured on and not trained on, chosen by the seed."""
    every_steps: int = Field(10, ge=1)
    """Optimizer steps between two measurements; the last step is always measured."""
    patience: int = Field(3, ge=1)
    """Measurements in a row without a gain after which training ends."""
    min_gain: float = Field(0.0, ge=0)
    """A loss counts as better where it is lower by more than this, a score where it is higher by more."""


class SelectionSettings(Frozen):
    """Judge held-out measurements by a reward model: its mean score of the model's own answers."""

    reward_model: str = Field(min_length=1)
    """Its artifact in the run's store: an id, the beginning of one, `reward_model/ID` as `explain` prints it, or the
    `s3://` place of its manifest. `last_round`: that of the round before; the first round goes by the held-out loss."""
    prompts: int = Field(64, ge=1)
    """Held-out prompts that are answered at each measurement, at most."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens of an answer, at most."""
    temperature: float = Field(1.0, ge=0)
    """Of the answers; each measurement draws with the same random numbers. 0 takes the most likely tokens."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""


class OfflineSettings(TrainingSettings):
    """What training on fixed rows has besides."""

    epochs: int = Field(1, ge=1)
    """Passes over the rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever the epochs."""
    max_response_tokens: int = Field(512, ge=4)
    """Longer responses are cut, and then carry no end-of-turn token."""
    max_truncated_frac: float = Field(0.05, ge=0, le=1)
    """Share of responses that may be cut so; above it the stage stops."""
    neftune_alpha: float | None = Field(None, gt=0, title="NEFTune alpha")
    """Noise on the input embeddings while training, uniform within alpha / sqrt(tokens * width); null: none."""
    early_stopping: EarlyStoppingSettings | None = None
    """Stop early on held-out rows; null: train all steps."""


class TruncationSettings(Frozen):
    """Where a sampled response ends for the reward model (N-details 14)."""

    token: str | int = "."  # noqa: S105  (no password)
    """A response ends at this token, which it keeps: its text, which must be one token, or its id."""
    after: int = Field(16, ge=0)
    """Tokens of the response before this place, counted from 0, do not end it."""
    keep_rest: bool = False
    """True: the policy is trained on what follows too, as in lm-human-preferences; false: it is cut off."""


class BreakerSettings(Frozen):
    """Limits on each iteration's rollouts; null switches a limit off.

    The first breach goes back to the weights of the last iteration within the limits, at half the
    learning rate; the second ends the training with the best iteration's weights.
    """

    max_kl_nats: float | None = Field(20.0, gt=0)
    """Mean KL of a response from the reference, at most."""
    min_kl_nats: float | None = Field(None, le=0)
    """The same, at least: below 0 the policy is paid for tokens that it would not have sampled."""
    max_length_drift: float | None = Field(2.0, gt=1)
    """Mean response length, at most times, and at least this fraction of, that of the first iteration."""
    min_entropy_nats: float | None = Field(0.1, ge=0)
    """Mean entropy of a token's prediction, at least."""
    min_finished_frac: float | None = Field(None, ge=0, le=1)
    """Share of responses that end by themselves, at least."""
    max_repeated_frac: float | None = Field(0.5, ge=0, le=1)
    """Share of a response's three-token pieces that it has said before, mean, at most."""
    max_duplicates_frac: float | None = Field(None, ge=0, le=1)
    """Share of responses that are the same as an earlier one of the iteration, at most."""
    max_heldout_drop: float | None = Field(1.0, gt=0)
    """How far the held-out reward model's mean score may fall below its best; needs `heldout_reward_model`."""


class PpoSettings(TrainingSettings):
    """Proximal policy optimisation against a reward model."""

    iterations: int = Field(20, ge=1)
    """Rounds of sampling and updating."""
    batch_size: int = Field(64, ge=2)
    """Rollouts of one iteration, one a prompt."""
    minibatches: int = Field(2, ge=1)
    """Optimizer steps that one pass over an iteration's rollouts is split into."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over an iteration's rollouts, each in a new order."""
    prompt_start_text: str | None = Field(None, min_length=1)
    """The last user turn begins after its first such text (N-details: "."); prompts without it are left out."""
    prompt_end_text: str | None = Field(None, min_length=1)
    """The last user turn ends with its last such text; prompts without it are left out."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a sampled response, at most."""
    min_new_tokens: int = Field(0, ge=0)
    """The end-of-turn token cannot be sampled before this many tokens."""
    stops_at_eos: bool = Field(True, title="Stops at EOS")
    """False: every response has `max_new_tokens`, an end-of-turn token is one like any other (N-details 4)."""
    truncation: TruncationSettings | None = None
    """End responses at a token for the reward model; those without it count as unfinished."""
    generator: GeneratorSpec = Field({"name": "continuous"}, validate_default=True)
    """What samples the responses, with its parameters; `prefline list generators` prints them."""
    process_seeds: Literal["shared", "rank_offset"] = "shared"
    """rank_offset: each process's share of the rollouts is drawn from seed + rank * 100003."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities in the ratio are taken at it too."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the per-token KL penalty at the start."""
    kl_estimator: Literal["k1", "k2", "k3", "full"] = "k1"
    """Estimate of the KL from policy to reference that is subtracted from the reward; full: over all words."""
    kl_controller: Literal["adaptive", "schulman", "fixed"] = "adaptive"
    """How the weight follows the target; schulman: doubled or halved outside 1.5 times the target."""
    kl_target_nats: float | None = Field(6.0, gt=0, title="KL target")
    """Target of the controller, nats a response; null keeps the weight fixed."""
    kl_horizon_responses: float = Field(10_000, gt=0)
    """Responses over which the adaptive controller corrects."""
    max_kl_nats: float = Field(50.0, gt=0)
    """Stop with an error when the mean KL of an iteration's responses exceeds this."""
    breaker: BreakerSettings | None = None
    """Limits that go back and then end the training, instead of an error; null: only `max_kl_nats`."""
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
    value_init: Literal["reward_model", "zero"] = "reward_model"
    """What the value function says before training: the score of the text so far, or 0 (N-details 11)."""
    value_learning_rate: float | None = Field(None, gt=0, title="Value learning rate")
    """Null: that of the policy."""
    whiten_rewards: bool = False
    """Scale each minibatch's rewards to unit variance, keeping their mean."""
    whiten_advantages: bool = True
    """Shift and scale each minibatch's advantages to mean 0 and unit variance."""
    whiten_variance: Literal["biased", "unbiased"] = "biased"
    """Divide by n (N-details) or by n - 1 (TRL)."""
    missing_eos: Literal["keep", "replace", "penalty"] = "replace"
    """What happens to the score of a response that did not end by itself."""
    missing_eos_value: float = -1.0
    """The score that replaces it, or what is added to it."""
    pretraining: PretrainingSettings | None = None
    """PPO-ptx: adds the language-model loss on plain text to every step; InstructGPT's weight is 27.8."""

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

    @model_validator(mode="after")
    def _lengths_go_together(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens")
        if self.truncation is not None and self.truncation.after >= self.max_new_tokens:
            raise ValueError(f"truncation.after = {self.truncation.after} is past max_new_tokens: nothing would end")
        return self
