"""Reward sources where a training asks for scores of its samples: rollouts become samples, models become resources.

Legend: R responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline_lib.errors import ConfigError, RewardError
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import Layout
from pipeline_lib.schema import Message, Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.collection import Scored
from pipeline_lib.training.critic import Critic, FrozenRewardModel
from pipeline_lib.training.measuring import scores_in_order
from pipeline_lib.training.recipe import StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.reward_set import RewardScorer
from pipeline_lib.training.rewards.contract import Sample
from pipeline_lib.training.rollout import rollout_tree


@dataclass(frozen=True)
class PromptRow:
    """What sources may know of a prompt besides its tokens."""

    messages: tuple[Message, ...]
    tags: tuple[str, ...] = ()
    reference: str = ""

    @classmethod
    def of(cls, record: Record) -> PromptRow:
        """Take a row; its best response is the reference, where it has responses that people want."""
        if not record.responses or record.desirable is False:
            return cls(record.messages, record.tags)
        best = record.ranks.index(min(record.ranks)) if record.ranks else 0
        return cls(record.messages, record.tags, record.responses[best].content)


@dataclass(frozen=True)
class SetScorer:
    """Gives PPO's rollouts the scores of a set of reward sources."""

    scorer: RewardScorer
    rows: Mapping[str, PromptRow]
    """By record id."""
    chat: ChatTokenizer

    def score(self, prompts: Sequence[Tree], responses: Sequence[Tree], is_finished: Sequence[bool]) -> Scored:
        """Score responses; see `collection.ResponseScorer`.

        Raises:
            RewardError: A source could not score a response and the set says to stop.
            StopRequestedError: The process was asked to end.
        """
        samples = [
            self._sample(prompt.record_id, tree, finished)
            for prompt, tree, finished in zip(prompts, responses, is_finished, strict=True)
        ]
        try:
            rewards = self.scorer.score(samples)
        except RewardError:
            # A source that was waiting gives up where the process is asked to end: that is no failure.
            if self.scorer.resources.should_stop():
                raise StopRequestedError from None
            raise
        kept = tuple(place for place, score in enumerate(rewards.scores) if score is not None)
        score_R = torch.tensor([score for score in rewards.scores if score is not None])
        figures = {
            name.removeprefix("reward/"): torch.tensor(value, dtype=torch.float64)
            for name, value in rewards.figures.items()
        }
        return Scored(score_R, figures, kept=kept)

    def state(self) -> str:
        """Return what a checkpoint must hold."""
        return self.scorer.state()

    def load_state(self, state: str) -> None:
        """Take a checkpoint's state back."""
        self.scorer.load_state(state)

    def _sample(self, record_id: str, tree: Tree, is_finished: bool) -> Sample:
        row = self.rows[record_id]
        text = self.chat.decode(list(tree.response_ids[0]))
        return Sample(record_id, row.messages, text, tree, is_finished, row.tags, row.reference)


@dataclass(frozen=True)
class GroupSetScorer:
    """The same for groups of samples: `sampling_rollouts.GroupScorer`."""

    each: SetScorer

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Scored:
        """Score every response by itself, prompt by prompt; see `SetScorer.score`."""
        flat = [(prompt, ids) for prompt, tree in zip(prompts, samples, strict=True) for ids in tree.response_ids]
        alone = [rollout_tree(place, list(prompt.prompt_ids), list(ids)) for place, (prompt, ids) in enumerate(flat)]
        return self.each.score([prompt for prompt, _ in flat], alone, is_finished)

    def state(self) -> str:
        """Return what a checkpoint must hold."""
        return self.each.state()

    def load_state(self, state: str) -> None:
        """Take a checkpoint's state back."""
        self.each.load_state(state)


@dataclass(frozen=True)
class ModelScores:
    """Scores trees with the reward models of a stage: `ScoresOf`."""

    models: Mapping[str, Critic | FrozenRewardModel]
    """By name; the main one is the critic's."""
    layout: Layout
    device: torch.device
    should_stop: Callable[[], bool]

    def __call__(self, name: str, trees: Sequence[Tree], *, is_raw: bool) -> list[float]:
        """Return a score a tree.

        Raises:
            ConfigError: There is no reward model of this name.
            StopRequestedError: The process was asked to end.
        """
        if name not in self.models:
            raise ConfigError(
                f"there is no reward model {name!r}",
                next_step=f"name one of {', '.join(sorted(self.models))}, or add it to reward_models",
            )
        found = scores_in_order(
            self.models[name], trees, self.layout, device=self.device, should_stop=self.should_stop, is_raw=is_raw
        )
        return list(found.tolist())


@dataclass(frozen=True)
class ReferenceAnswers:
    """Lets the reference answer questions: `AnswersOf`."""

    reference: Reference
    chat: ChatTokenizer
    should_stop: Callable[[], bool]

    def __call__(self, questions: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Return the most likely answer to each question; an empty one where the question is too long.

        Raises:
            StopRequestedError: The process was asked to end.
        """
        prompts = [self._ids(question) for question in questions]
        with self.reference.active() as model:
            context_tokens = getattr(model.config, "max_position_embeddings", None)
            fits = [
                place
                for place, ids in enumerate(prompts)
                if context_tokens is None or len(ids) + max_new_tokens <= context_tokens
            ]
            settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=0)
            drawn = sample(
                model, [prompts[place] for place in fits], settings, eos_id=self.chat.eos_id,
                pad_id=self.chat.pad_id, seed=0, on_batch=lambda _: self._stop_as_asked(),
            )  # fmt: skip
        answers = dict(zip(fits, (self.chat.decode(list(one.ids)) for one in drawn), strict=True))
        return [answers.get(place, "") for place in range(len(questions))]

    def _ids(self, question: str) -> list[int]:
        # A response may spell a control token out; the judge must not take it for one.
        for control in self.chat.control_strings:
            question = question.replace(control, " ")
        turn = Message(role="user", content=question)
        return self.chat.ids(self.chat.render((turn,), add_generation_prompt=True))

    def _stop_as_asked(self) -> None:
        if self.should_stop():
            raise StopRequestedError
