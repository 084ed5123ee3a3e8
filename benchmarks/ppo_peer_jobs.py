"""What the comparison of PPO with TRL's PPOTrainer runs: presets, the plan of a process, what it found.

Light: imports no torch, so that the driver's own memory does not count in its children's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline_lib.validation import Frozen

Side = Literal["ours", "peer"]
Trainable = Literal["lora", "full"]


class PpoPreset(Frozen):
    """One size of the comparison; both sides take all of it."""

    model: Literal["smollm2", "toy"]
    """SmolLM2-135M-Instruct on texts of the Python reference; or the toy speaker of `ppo_learns`."""
    trainable: Trainable
    """Which weights of policy and value function are trained."""
    iterations: int
    """Rounds of sampling and updating; the first is not timed."""
    batch_size: int
    """Responses of an iteration."""
    minibatches: int
    ppo_epochs: int
    new_tokens: int
    """Tokens of a response, at most; without `stops_at_eos` exactly."""
    stops_at_eos: bool
    learning_rate: float
    """Of policy and value function."""
    kl_coef: float
    wanted: tuple[str, ...]
    """Words that the rule pays for."""
    runs: int
    """Paired runs, interleaved; medians count."""
    tokens_per_batch: int = 512
    """Tokens of one of our forwards, at most."""
    temperature: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    lora_rank: int = 16
    lora_alpha: int = 32
    seed: int = 11
    speed_goal: float | None = 2.0
    """None: the preset is there for its reward; its model is too small for its time to say anything of others."""
    memory_goal: float | None = 0.5

    @property
    def responses(self) -> int:
        """Responses of the whole training."""
        return self.iterations * self.batch_size


COMMON_WORDS = ("the", "of", "and", "to", "in", "is", "a", "for")

PRESETS: dict[str, PpoPreset] = {
    "smollm2": PpoPreset(
        model="smollm2", trainable="lora", iterations=5, batch_size=16, minibatches=2, ppo_epochs=4, new_tokens=32,
        stops_at_eos=False, learning_rate=2e-4, kl_coef=0.05, wanted=COMMON_WORDS, runs=3, tokens_per_batch=1536,
    ),
    "smollm2-ends": PpoPreset(
        model="smollm2", trainable="lora", iterations=5, batch_size=16, minibatches=2, ppo_epochs=4, new_tokens=128,
        stops_at_eos=True, learning_rate=2e-4, kl_coef=0.05, wanted=COMMON_WORDS, runs=3, tokens_per_batch=1536,
    ),
    "smollm2-full": PpoPreset(
        model="smollm2", trainable="full", iterations=3, batch_size=16, minibatches=2, ppo_epochs=4, new_tokens=32,
        stops_at_eos=False, learning_rate=1e-5, kl_coef=0.05, wanted=COMMON_WORDS, runs=1,
    ),
    "toy": PpoPreset(
        model="toy", trainable="full", iterations=40, batch_size=64, minibatches=2, ppo_epochs=2, new_tokens=24,
        stops_at_eos=True, learning_rate=5e-4, kl_coef=0.01, wanted=("the", "silver", "river", "sings"), runs=3,
        tokens_per_batch=512, speed_goal=None, memory_goal=None,
    ),
    "toy-lora": PpoPreset(
        model="toy", trainable="lora", iterations=2, batch_size=16, minibatches=2, ppo_epochs=2, new_tokens=8,
        stops_at_eos=False, learning_rate=5e-4, kl_coef=0.01, wanted=("the", "silver"), runs=1,
    ),
}  # fmt: skip


class PpoPlan(Frozen):
    """What one process does; written as JSON, read by both sides."""

    side: Side
    preset: PpoPreset
    threads: int
    folder: Path
    """Where the prepared files are."""
    output: Path
    """Where the figures go."""


class Prepared(Frozen):
    """What both sides start from."""

    model: Path
    """A plain model folder."""
    prompts: list[list[list[int]]]
    """Token ids of the prompts of each iteration."""
    processor: str
    eos_token: str
    pad_token: str
    """A token of its own, that ends nothing."""
    rope_theta: float
    """Of the rotary embeddings; the peer's older transformers reads it elsewhere."""
    first_prompt_nats: float
    """Mean -log-probability of the first prompt's tokens: both sides must load the same model."""


class PpoMeasured(Frozen):
    """What one process found out."""

    side: Side
    iteration_ends_s: list[float]
    """When each iteration was done, from an arbitrary start."""
    scores: list[float]
    """Mean of the rule over each iteration's responses."""
    kl_nats: list[float]
    """Mean KL of each iteration's responses from the start, as the side itself measured it."""
    peak_bytes: int
    """Peak resident memory of the process until training was over."""
    trainable_parameters: int
    versions: dict[str, str]
    note: str = ""
    """The settings of this side in words."""

    @property
    def timed_s(self) -> float:
        """Seconds of the iterations after the first."""
        return self.iteration_ends_s[-1] - self.iteration_ends_s[0]

    @property
    def last_score(self) -> float:
        """Mean of the rule over the last fifth of the iterations."""
        last = self.scores[-max(1, len(self.scores) // 5) :]
        return sum(last) / len(last)


class PpoResult(Frozen):
    """Both sides' runs."""

    name: str
    preset: PpoPreset
    processor: str
    threads: int
    runs: dict[Side, list[PpoMeasured]]
