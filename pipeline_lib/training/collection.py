"""Rollouts of one iteration: sampled, ended where they must end, measured and scored.

Every model that PPO asks runs here, on the same token ids in the same layout. Whoever gives the
score stands behind `ResponseScorer`; by default it is the reward model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline_lib.errors import ConfigError, DataError, DivergedError, RewardError
from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Generator
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.sampling import Sample, SamplingSettings
from pipeline_lib.models.scoring import Layout
from pipeline_lib.rl.monitor import truncated_length
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.critic import Critic, FrozenRewardModel
from pipeline_lib.training.generating import EveryEighth, mismatch_nats, policy_for
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.guards import named_rows
from pipeline_lib.training.measuring import ScoresResponses, logps_and_kl, scores_in_order, tokens_in_order
from pipeline_lib.training.recipe import StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import ValuedRollouts, rollout_tree
from pipeline_lib.training.settings import PpoSettings
from pipeline_lib.training.trained_model import TrainedModel

PROCESS_SEED_STRIDE = 100_003
"""Between the seeds of two processes (N-details 6)."""


@dataclass(frozen=True)
class Scored:
    """What a scorer says of responses."""

    score_R: Tensor
    """One score a response, in the order given."""
    parts_R: dict[str, Tensor] = field(default_factory=dict)
    """What the score is made of, by name, a number a response or one of all; each becomes a figure `reward/<name>`."""
    kept: tuple[int, ...] | None = None
    """Places of the responses that have a score, ascending; the others are left out. None: all."""


@runtime_checkable
class RemembersScores(Protocol):
    """A scorer whose scores depend on earlier ones."""

    def state(self) -> str:
        """Return what a checkpoint must hold."""

    def load_state(self, state: str) -> None:
        """Take a checkpoint's state back."""


@contextmanager
def scores_once(scorer: object) -> Iterator[None]:
    """Take back what a scorer has remembered in a block that the process was asked to end.

    The next process scores these responses anew: they must not count twice.
    """
    before = scorer.state() if isinstance(scorer, RemembersScores) else None
    try:
        yield
    except StopRequestedError:
        if isinstance(scorer, RemembersScores) and before is not None:
            scorer.load_state(before)
        raise


class ResponseScorer(Protocol):
    """Gives every sampled response its score: the one place where PPO's reward comes from."""

    def score(self, prompts: Sequence[Tree], responses: Sequence[Tree], is_finished: Sequence[bool]) -> Scored:
        """Score responses.

        Args:
            prompts: As the recipe got them; the record id is the row's.
            responses: The same prompts with one response each, as far as it is scored; the record id
                is the place in this list.
            is_finished: True where the response ended by itself.
        """


@dataclass(frozen=True)
class Collector:
    """The models and settings that rollouts are made with."""

    policy: TrainedModel
    reference: Reference
    critic: Critic
    layout: Layout
    chat: ChatTokenizer
    settings: PpoSettings
    should_stop: Callable[[], bool]
    on_text: Callable[[str], None]
    heldout: FrozenRewardModel | None = None
    scorer: ResponseScorer | None = None
    """None: the reward model."""
    num_processes: int = field(default_factory=lambda: ProcessGroup().size)

    @cached_property
    def generator(self) -> Generator:
        """What responses are sampled by, opened where it is first needed."""
        return open_generator(
            self.settings.generator, policy_for(self.policy), eos_id=self.chat.eos_id, pad_id=self.chat.pad_id
        )

    def collect(self, prompts: Sequence[Tree], iteration: int) -> ValuedRollouts:
        """Sample one response a prompt and measure it.

        Raises:
            DivergedError: A score is not finite; the rows are named.
            RewardError: Too few responses could be scored.
            StopRequestedError: The process was asked to end.
        """
        with scores_once(self.scorer):
            return self._collect(prompts, iteration)

    def _collect(self, prompts: Sequence[Tree], iteration: int) -> ValuedRollouts:
        drawn = self._sample(prompts, iteration)
        ends = [self._end(one) for one in drawn]
        truncation = self.settings.truncation
        is_cut = truncation is not None and not truncation.keep_rest
        trained = [one.ids[:end] if is_cut else one.ids for one, (end, _) in zip(drawn, ends, strict=True)]
        scored_trees = _trees(prompts, [one.ids[:end] for one, (end, _) in zip(drawn, ends, strict=True)])
        is_finished = [is_finished for _, is_finished in ends]
        self.on_text(f"iteration {iteration + 1}/{self.settings.iterations}: scoring {len(prompts)} responses")
        scored = self._score(prompts, scored_trees, is_finished)
        if scored.kept is not None:
            kept = self._enough(scored.kept)
            prompts, trained = [prompts[place] for place in kept], [trained[place] for place in kept]
            drawn = [drawn[place] for place in kept]
            scored_trees = _trees(prompts, [scored_trees[place].response_ids[0] for place in kept])
            is_finished = [is_finished[place] for place in kept]
        trees = _trees(prompts, trained)
        figures = tokens_in_order(trees, self.layout, self._of_batch, device=self._device, should_stop=self.should_stop)
        heldout_R = None
        if self.heldout is not None:
            heldout_R = self._scores(self.heldout, scored_trees)
            require_finite_scores(heldout_R, prompts, whose="the held-out reward model")
        return ValuedRollouts(
            tuple(trees), **figures, score_R=scored.score_R, is_finished_R=torch.tensor(is_finished),
            heldout_score_R=heldout_R, parts_R=scored.parts_R,
            mismatch_nats=mismatch_nats(drawn, figures["logp_N"].split([len(ids) for ids in trained])),
        )  # fmt: skip

    def _sample(self, prompts: Sequence[Tree], iteration: int) -> list[Sample]:
        """Sample in shares as the processes have them, each from its own seed, where that is asked for."""
        settings = self.settings
        shares = self.num_processes if settings.process_seeds == "rank_offset" else 1
        drawn: dict[int, Sample] = {}
        told = EveryEighth(len(prompts))

        def on_batch(done: int) -> None:
            num = len(drawn) + done
            if told.is_due(num):
                self.on_text(f"iteration {iteration + 1}/{settings.iterations}: sampled {num}/{len(prompts)}")
            if self.should_stop():
                raise StopRequestedError

        self.generator.update(policy_for(self.policy))
        for rank in range(shares):
            places = range(rank, len(prompts), shares)
            samples = self.generator.generate(
                [prompts[place].prompt_ids for place in places],
                SamplingSettings(
                    max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                    min_new_tokens=settings.min_new_tokens, stops_at_eos=settings.stops_at_eos,
                ),
                seed=derive_seed(settings.seed + rank * PROCESS_SEED_STRIDE, "rollout", iteration), on_batch=on_batch,
            )  # fmt: skip
            drawn |= dict(zip(places, samples, strict=True))
        return [drawn[place] for place in range(len(prompts))]

    def _end(self, drawn: Sample) -> tuple[int, bool]:
        """Return how many tokens of a response are scored, and whether it ended by itself."""
        truncation = self.settings.truncation
        if truncation is not None:
            end = truncated_length(drawn.ids, token_id(truncation.token, self.chat), after=truncation.after)
        elif not self.settings.stops_at_eos:
            end = truncated_length(drawn.ids, self.chat.eos_id, after=0)
        else:
            return len(drawn.ids), drawn.is_finished
        return (len(drawn.ids), False) if end is None else (end, True)

    def _of_batch(self, batch: TreeBatch) -> dict[str, Tensor]:
        figures = logps_and_kl(self.policy, self.reference, batch, temperature=self.settings.temperature)
        return {**figures, "value_N": self.critic.values(batch)}

    def _score(self, prompts: Sequence[Tree], trees: list[Tree], is_finished: list[bool]) -> Scored:
        if self.scorer is not None:
            scored = self.scorer.score(prompts, trees, is_finished)
        else:
            scored = Scored(self._scores(self.critic, trees))
        kept = prompts if scored.kept is None else [prompts[place] for place in scored.kept]
        require_finite_scores(scored.score_R, kept, whose="the reward")
        return scored

    def _enough(self, kept: tuple[int, ...]) -> tuple[int, ...]:
        if len(kept) < self.settings.minibatches:
            raise RewardError(
                f"{len(kept)} responses have a score, too few for {self.settings.minibatches} minibatches",
                next_step="correct the reward sources, raise ppo.batch_size or lower ppo.minibatches",
            )
        return kept

    def _scores(self, model: ScoresResponses, trees: list[Tree]) -> Tensor:
        return scores_in_order(model, trees, self.layout, device=self._device, should_stop=self.should_stop)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.policy.model.device
        return device


def token_id(token: str | int, chat: ChatTokenizer) -> int:
    """Return the id of the token that ends responses.

    Raises:
        ConfigError: The text is not one token, or there is no token of that id.
    """
    if isinstance(token, int):
        if not 0 <= token < len(chat.tokenizer):
            raise ConfigError(
                f"ppo.truncation.token = {token}: the tokenizer has ids 0 to {len(chat.tokenizer) - 1}",
                next_step="give the id of one of its tokens, or the token's text",
            )
        return token
    ids = chat.ids(token)
    if len(ids) != 1:
        raise ConfigError(
            f"ppo.truncation.token = {token!r}: the tokenizer makes {len(ids)} tokens of it",
            next_step="give a text that is one token, or the token's id",
        )
    return ids[0]


def require_finite_scores(score_R: Tensor, prompts: Sequence[Tree], *, whose: str) -> None:
    """Stop where a response's score is NaN or infinite: it would spoil every weight.

    Args:
        score_R: The scores.
        prompts: The prompt of each response; the record id is its row's.
        whose: What gave the scores.

    Raises:
        DivergedError: Naming the rows of the prompts.
    """
    odd = [tree.record_id for tree, score in zip(prompts, score_R.tolist(), strict=True) if not abs(score) < torch.inf]
    if odd:
        rows = list(dict.fromkeys(odd))
        raise DivergedError(
            f"{whose} gave {len(odd)} of {len(prompts)} responses a score that is not finite; rows: {named_rows(rows)}",
            next_step="train the reward model with `precision: fp32`, or look at the rows named above",
            row_ids=tuple(rows),
        )


def require_prompts(prompts: Sequence[Tree], *, context_tokens: int | None, max_new_tokens: int) -> None:
    """Refuse prompts that nothing can be sampled after.

    Args:
        prompts: Trees without responses.
        context_tokens: Positions that the model knows; None where its configuration does not say.
        max_new_tokens: Tokens of a response, at most.

    Raises:
        DataError: Prompts without a token, or too long for a response to follow; the rows are named.
    """
    empty = [tree.record_id for tree in prompts if not tree.prompt_ids]
    if empty:
        raise DataError(
            f"{len(empty)} prompts have no token; rows: {named_rows(empty)}", next_step="keep the filter rule `empty`"
        )
    if context_tokens is None:
        return
    long = [tree.record_id for tree in prompts if len(tree.prompt_ids) + max_new_tokens > context_tokens]
    if long:
        raise DataError(
            f"{len(long)} prompts leave no room for {max_new_tokens} tokens in the model's context of "
            f"{context_tokens}; rows: {named_rows(long)}",
            next_step=f"set max_prompt_tokens to {max(context_tokens - max_new_tokens, 0)} at most, "
            "or lower max_new_tokens",
        )


def _trees(prompts: Sequence[Tree], responses: Sequence[Sequence[int]]) -> list[Tree]:
    return [
        rollout_tree(index, tree.prompt_ids, ids)
        for index, (tree, ids) in enumerate(zip(prompts, responses, strict=True))
    ]


def sample_line(chat: ChatTokenizer, tree: Tree, *, place: int, iteration: int, score: float) -> str:
    """Return one of a tree's responses as a line of `samples.jsonl`."""
    row = {
        "iteration": iteration,
        "prompt": chat.decode(list(tree.prompt_ids)),
        "response": chat.decode(list(tree.response_ids[place])),
        "score": score,
    }
    return json.dumps(row, ensure_ascii=False, sort_keys=True)
