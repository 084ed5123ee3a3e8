"""Rollouts of K samples a prompt: drawn, scored and kept as prompt trees, the prompt once.

Legend: G prompts, K samples of each, R = G K responses, prompt by prompt; N tokens of all responses,
flat in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError, RewardError
from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Generator
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.models.scoring import Layout
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.collection import Scored, require_finite_scores, scores_once
from pipeline_lib.training.critic import FrozenRewardModel
from pipeline_lib.training.generating import EveryEighth, mismatch_nats, policy_for
from pipeline_lib.training.measuring import logps_and_kl, scores_in_order, tokens_in_order
from pipeline_lib.training.recipe import StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import Rollouts, rollout_tree
from pipeline_lib.training.trained_model import TrainedModel

_SHOWN = 8


class GroupScorer(Protocol):
    """Gives every sample its score: the one place where the reward comes from."""

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor | Scored:
        """Return the score of every response, `(R,)`, prompt by prompt; `Scored` where some have none.

        Args:
            prompts: Trees without responses; the record id is the row's.
            samples: The same prompts with their K responses.
            is_finished: True where a response ended by itself, `(R,)`.
        """


def group_tree(index: int, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Tree:
    """Return a prompt and its samples as a tree; nothing of the prompt counts."""
    return rollout_tree(index, prompt_ids, *responses)


def prompt_trees(encoder: Encoder, records: Sequence[Record]) -> list[Tree]:
    """Encode every different prompt of some rows once, in the order of the rows, without responses."""
    first_seen = {record.messages: record for record in reversed(records)}
    kept = [record for record in records if first_seen[record.messages] is record]
    return [encoder.tree(record.model_copy(update={"responses": (), "ranks": ()})) for record in kept]


@dataclass(frozen=True)
class RewardModelScorer:
    """A reward model's normalised score of every response: `GroupScorer`."""

    model: FrozenRewardModel
    layout: Layout
    should_stop: Callable[[], bool] = lambda: False

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor:  # noqa: ARG002
        """Score every response, prompt by prompt."""
        return scores_in_order(
            self.model, samples, self.layout, device=self.model.model.device, should_stop=self.should_stop
        )


@dataclass(frozen=True)
class GroupSampler:
    """Draws K samples a prompt from the policy and asks everyone what they say of them."""

    policy: TrainedModel
    reference: Reference
    scorer: GroupScorer
    layout: Layout
    chat: ChatTokenizer
    settings: SamplingSettings
    samples_per_prompt: int
    should_stop: Callable[[], bool]
    on_text: Callable[[str], None]
    min_prompts: int = 1
    """Prompts that must be left where a scorer leaves some out."""
    generator_spec: PluginSpec = field(default_factory=lambda: {"name": "continuous"})
    """What samples the responses."""
    heldout: FrozenRewardModel | None = None
    """A reward model that only measures."""

    @cached_property
    def generator(self) -> Generator:
        """What responses are sampled by, opened where it is first needed."""
        return open_generator(
            self.generator_spec, policy_for(self.policy), eos_id=self.chat.eos_id, pad_id=self.chat.pad_id
        )

    def collect(self, prompts: Sequence[Tree], *, seed: int, where: str) -> Rollouts:
        """Return the rollouts of some prompts, a function of (seed, prompts, weights).

        Args:
            prompts: Trees without responses.
            seed: Seed of the samples.
            where: The iteration, for messages.

        Raises:
            StopRequestedError: The process was asked to end; nothing has changed.
            DivergedError: There is not one finite score a response.
            RewardError: Too few prompts have a score for every sample.
        """
        with scores_once(self.scorer):
            return self._collect(prompts, seed, where)

    def _collect(self, prompts: Sequence[Tree], seed: int, where: str) -> Rollouts:
        told = EveryEighth(len(prompts))

        def on_batch(done: int) -> None:
            if told.is_due(done):
                self.on_text(f"{where}: sampled {done}/{len(prompts)} prompts")
            self._stop_as_asked()

        self.generator.update(policy_for(self.policy))
        drawn = self.generator.generate(
            [tree.prompt_ids for tree in prompts], self.settings, seed=seed,
            samples_per_prompt=self.samples_per_prompt, on_batch=on_batch,
        )  # fmt: skip
        size = self.samples_per_prompt
        trees = tuple(
            group_tree(index, tree.prompt_ids, [one.ids for one in drawn[index * size : (index + 1) * size]])
            for index, tree in enumerate(prompts)
        )
        self.on_text(f"{where}: scoring {len(drawn)} responses")
        is_finished = torch.tensor([one.is_finished for one in drawn])
        given = self.scorer.score(prompts, trees, is_finished.tolist())
        scored = given if isinstance(given, Scored) else Scored(given)
        score_R = scored.score_R.float().cpu()
        self._require_scores(score_R, scored.kept, prompts, where)
        if scored.kept is not None:
            groups = self._whole_groups(scored.kept, len(prompts), where)
            rows = [group * size + place for group in groups for place in range(size)]
            score_R = score_R[torch.isin(torch.tensor(scored.kept), torch.tensor(rows))]
            trees = tuple(
                group_tree(index, trees[group].prompt_ids, trees[group].response_ids)
                for index, group in enumerate(groups)
            )
            is_finished = is_finished[rows]
            drawn = [drawn[row] for row in rows]
            prompts = [prompts[group] for group in groups]
        figures = tokens_in_order(trees, self.layout, self._of_batch, device=self._device, should_stop=self.should_stop)
        lengths = [len(ids) for tree in trees for ids in tree.response_ids]
        return Rollouts(
            trees, **figures, score_R=score_R, is_finished_R=is_finished, parts_R=scored.parts_R,
            heldout_score_R=self._heldout_scores(trees, prompts),
            mismatch_nats=mismatch_nats(drawn, figures["logp_N"].split(lengths)),
        )  # fmt: skip

    def _of_batch(self, batch: TreeBatch) -> dict[str, Tensor]:
        return logps_and_kl(self.policy, self.reference, batch, temperature=self.settings.temperature)

    def _heldout_scores(self, trees: Sequence[Tree], prompts: Sequence[Tree]) -> Tensor | None:
        if self.heldout is None:
            return None
        score_R = scores_in_order(self.heldout, trees, self.layout, device=self._device, should_stop=self.should_stop)
        of_responses = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        require_finite_scores(score_R, of_responses, whose="the held-out reward model")
        return score_R

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.policy.model.device
        return device

    def _whole_groups(self, kept: Sequence[int], num_prompts: int, where: str) -> list[int]:
        """Return the prompts of which every sample has a score: the others tell less than they should."""
        size, with_score = self.samples_per_prompt, set(kept)
        groups = [
            group for group in range(num_prompts) if with_score.issuperset(range(group * size, (group + 1) * size))
        ]
        if len(groups) < self.min_prompts:
            raise RewardError(
                f"{where}: {len(groups)} of {num_prompts} prompts have a score for each of their {size} samples, "
                f"{self.min_prompts} are needed",
                next_step="correct the reward sources, raise batch_size or lower minibatches",
            )
        return groups

    def _stop_as_asked(self) -> None:
        if self.should_stop():
            raise StopRequestedError

    def _require_scores(
        self, score_R: Tensor, kept: tuple[int, ...] | None, prompts: Sequence[Tree], where: str
    ) -> None:
        places = range(len(prompts) * self.samples_per_prompt) if kept is None else kept
        if score_R.shape != (len(places),):
            raise DivergedError(
                f"{where}: the reward gave {tuple(score_R.shape)} scores for "
                f"{len(prompts)} x {self.samples_per_prompt} responses",
                next_step="a reward must give one score a response",
            )
        bad = (~torch.isfinite(score_R)).nonzero().flatten().tolist()
        if not bad:
            return
        ids = list(dict.fromkeys(prompts[places[row] // self.samples_per_prompt].record_id for row in bad))
        raise DivergedError(
            f"{where}: {len(bad)} of {score_R.numel()} scores are not finite; rows of their prompts: "
            + ", ".join(name[:12] for name in ids[:_SHOWN]),
            next_step="look at what the reward gives on these prompts",
            row_ids=tuple(ids),
        )
