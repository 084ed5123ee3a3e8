"""The models of stage `rollouts`: sample responses for some prompts and score them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from transformers import PreTrainedModel

from pipeline_lib.errors import DataError
from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.precision import default_device, resolve_dtype
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.models.scoring import Layout, response_scores
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.schema import Record
from pipeline_lib.stages.contract import Inputs, StageContext
from pipeline_lib.stages.training_stage import fetch_model, normalization_of
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree, place_of
from pipeline_lib.training.critic import Normalization

if TYPE_CHECKING:
    from pipeline_lib.stages.rollouts import RolloutsConfig

TOKENS_PER_FORWARD = 1024
"""Fixed, so that scores have the same bits whatever the training's batches are."""


class Drawn(TypedDict):
    """One response as a part keeps it."""

    ids: list[int]
    is_finished: bool
    raw_score: float


@dataclass
class Sampler:
    """Samples and scores; the models are loaded when the first part needs them."""

    config: RolloutsConfig
    context: StageContext
    directory: Path
    reward_directory: Path
    dtype: torch.dtype
    chat: ChatTokenizer
    reward_chat: ChatTokenizer
    """The scorer's own: a model may answer from behind words that only it knows."""
    normalization: Normalization = field(repr=False)

    @classmethod
    def open(cls, config: RolloutsConfig, inputs: Inputs, context: StageContext) -> Sampler:
        """Fetch both models' files."""
        directory = fetch_model(context, inputs["model"], "model")
        reward_directory = fetch_model(context, inputs["reward_model"], "reward_model")
        dtype = resolve_dtype(config.precision)
        chats = ChatTokenizer.load(directory), ChatTokenizer.load(reward_directory)
        return cls(config, context, directory, reward_directory, dtype, *chats, normalization_of(reward_directory))

    @cached_property
    def policy(self) -> PreTrainedModel:
        """The model that answers."""
        return load_causal_model(self.directory, dtype=self.dtype).to(default_device()).eval()

    @cached_property
    def generator(self) -> Generator:
        """What lets it answer."""
        policy = Policy(self.directory, lambda: self.policy)
        return open_generator(self.config.generator, policy, eos_id=self.chat.eos_id, pad_id=self.chat.pad_id)

    @cached_property
    def reward_model(self) -> PreTrainedModel:
        """The model that scores."""
        return load_scalar_model(self.reward_directory, dtype=self.dtype).to(default_device()).eval()

    def draw(self, prompts: Sequence[Record], *, seed: int) -> list[list[Drawn]]:
        """Sample and score K responses for each prompt.

        Raises:
            DataError: A score is not finite.
        """
        count = self.config.samples_per_prompt
        samples = self.generator.generate(
            self._prompt_ids(self.chat, prompts),
            SamplingSettings(
                max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature,
                top_p=self.config.top_p, batch_size=self.config.batch_size,
            ),
            seed=seed, samples_per_prompt=count,
        )  # fmt: skip
        groups = [samples[start : start + count] for start in range(0, len(samples), count)]
        asked = self._prompt_ids(self.reward_chat, prompts)
        trees = [
            Tree(prompt.id, tuple(ids), tuple(each.ids for each in group), (False,) * len(ids))
            for prompt, ids, group in zip(prompts, asked, groups, strict=True)
        ]
        is_packed = supports_trees(self.reward_model, log=self.context.log)
        scores = response_scores(self.reward_model, trees, Layout(is_packed, self.chat.pad_id, TOKENS_PER_FORWARD))
        for prompt in prompts:
            _require_finite(scores[prompt.id], prompt)
        return [
            [
                Drawn(ids=list(each.ids), is_finished=each.is_finished, raw_score=score)
                for each, score in zip(group, scores[prompt.id], strict=True)
            ]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def normalized(self, raw_score: float) -> float:
        """Return a score in the reward model's normalised units."""
        return self.normalization(raw_score)

    def scored_prompt_ids(self, prompt: Record) -> list[int]:
        """Return a prompt as the scorers see it."""
        return self._prompt_ids(self.reward_chat, [prompt])[0]

    def _prompt_ids(self, chat: ChatTokenizer, prompts: Sequence[Record]) -> list[list[int]]:
        encoder = Encoder(chat, self.config.max_prompt_tokens, max_response_tokens=1)
        return [encoder.prompt(prompt.messages, where=place_of(prompt))[0] for prompt in prompts]


def _require_finite(scores: Sequence[float], prompt: Record) -> None:
    broken = [score for score in scores if not math.isfinite(score)]
    if broken:
        raise DataError(
            f"{place_of(prompt)}: the reward model gave {len(broken)} of {len(scores)} responses the score {broken[0]}",
            next_step="train the reward model with a lower learning rate, or set precision: fp32",
        )
