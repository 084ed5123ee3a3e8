"""Rollouts of K samples a prompt: drawn, scored and kept as prompt trees, the prompt once.

Legend: G prompts, K samples of each, R = G K responses, prompt by prompt; N tokens of all responses,
flat in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError, RewardError
from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Generator
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.precision import default_device
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.models.scoring import Layout, response_scores
from pipeline_lib.registry import PluginSpec
from pipeline_lib.schema import Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.collection import Scored, scores_once
from pipeline_lib.training.critic import Normalization
from pipeline_lib.training.generating import EveryEighth, mismatch_nats, policy_for
from pipeline_lib.training.recipe import StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, dtype_for

_INTS = ("prompt_ids", "prompt_lengths_G", "response_ids", "lengths_R")
_PART = "part:"
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


@dataclass(frozen=True)
class GroupRollouts:
    """The samples of one iteration, with what policy, reference and reward say of them."""

    trees: tuple[Tree, ...]
    """One prompt and its K samples each; the record id is the prompt's place in the iteration."""
    logp_N: Tensor
    """Log-probability under the policy that sampled, at the sampling temperature, nats."""
    ref_logp_N: Tensor
    """Log-probability under the reference, nats."""
    entropy_N: Tensor
    """Entropy of the policy's prediction, nats."""
    score_R: Tensor
    """Score of each response, before any missing-EOS rule."""
    is_finished_R: Tensor
    """True where the response ended by itself."""
    parts_R: dict[str, Tensor] = field(default_factory=dict)
    """What the score is made of, by name, a number a response or one of all; empty where it has no parts."""
    mismatch_nats: Tensor | None = None
    """Mean difference a token between the log-probabilities of sampler and trainer; None where they are one model."""

    @property
    def samples_per_prompt(self) -> int:
        """K."""
        return len(self.trees[0].response_ids)

    @property
    def lengths_R(self) -> list[int]:
        """Tokens of each response."""
        return [len(ids) for tree in self.trees for ids in tree.response_ids]

    def by_tree(self, values_N: Tensor) -> list[Tensor]:
        """Split a figure of every token into one tensor a prompt."""
        return list(values_N.split([sum(map(len, tree.response_ids)) for tree in self.trees]))

    def by_response(self, values_N: Tensor) -> list[Tensor]:
        """Split a figure of every token into one tensor a response."""
        return list(values_N.split(self.lengths_R))

    def groups(self, values_R: Tensor) -> Tensor:
        """Lay a figure of every response out as (G, K)."""
        return values_R.view(len(self.trees), self.samples_per_prompt)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole as tensors, for a checkpoint."""
        mismatch = {} if self.mismatch_nats is None else {"mismatch_nats": self.mismatch_nats}
        return {
            **mismatch,
            **{_PART + name: value for name, value in self.parts_R.items()},
            "prompt_ids": torch.tensor([token for tree in self.trees for token in tree.prompt_ids]),
            "prompt_lengths_G": torch.tensor([len(tree.prompt_ids) for tree in self.trees]),
            "response_ids": torch.tensor([token for tree in self.trees for ids in tree.response_ids for token in ids]),
            "lengths_R": torch.tensor(self.lengths_R),
            "logp_N": self.logp_N, "ref_logp_N": self.ref_logp_N, "entropy_N": self.entropy_N,
            "score_R": self.score_R, "is_finished_R": self.is_finished_R,
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> GroupRollouts:
        """Take the whole back from a checkpoint's tensors."""
        prompts = [row.tolist() for row in tensors["prompt_ids"].split(tensors["prompt_lengths_G"].tolist())]
        responses = [row.tolist() for row in tensors["response_ids"].split(tensors["lengths_R"].tolist())]
        samples = len(responses) // len(prompts)
        trees = tuple(
            group_tree(index, prompt, responses[index * samples : (index + 1) * samples])
            for index, prompt in enumerate(prompts)
        )
        parts = {name.removeprefix(_PART): value for name, value in tensors.items() if name.startswith(_PART)}
        figures = {name: value for name, value in tensors.items() if name not in _INTS and not name.startswith(_PART)}
        return cls(trees, **figures, parts_R=parts)


def group_tree(index: int, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> Tree:
    """Return a prompt and its samples as a tree; nothing of the prompt counts."""
    return Tree(str(index), tuple(prompt_ids), tuple(map(tuple, responses)), (False,) * len(prompt_ids))


def prompt_trees(encoder: Encoder, records: Sequence[Record]) -> list[Tree]:
    """Encode every different prompt of some rows once, in the order of the rows, without responses."""
    first_seen = {record.messages: record for record in reversed(records)}
    kept = [record for record in records if first_seen[record.messages] is record]
    return [encoder.tree(record.model_copy(update={"responses": (), "ranks": ()})) for record in kept]


class RewardModelScorer:
    """A reward model, frozen: the score of a response at its last token, normalised."""

    def __init__(self, directory: Path, settings: TrainingSettings, normalization: Normalization, layout: Layout):
        """Load a reward model's folder.

        Args:
            directory: The reward model's files.
            settings: Precision.
            normalization: The reward model's gain and bias.
            layout: How samples are laid out as forwards.
        """
        model = load_scalar_model(directory, dtype=dtype_for(settings)).to(default_device()).eval()
        self.model = model.requires_grad_(requires_grad=False)
        self.normalization, self.layout = normalization, layout

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor:  # noqa: ARG002
        """Score every response, prompt by prompt."""
        by_id = response_scores(self.model, samples, self.layout)
        raw_R = torch.tensor([score for tree in samples for score in by_id[tree.record_id]])
        return raw_R * self.normalization.gain + self.normalization.bias


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

    @cached_property
    def generator(self) -> Generator:
        """What responses are sampled by, opened where it is first needed."""
        return open_generator(
            self.generator_spec, policy_for(self.policy), eos_id=self.chat.eos_id, pad_id=self.chat.pad_id
        )

    def collect(self, prompts: Sequence[Tree], *, seed: int, where: str) -> GroupRollouts:
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

    def _collect(self, prompts: Sequence[Tree], seed: int, where: str) -> GroupRollouts:
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
        figures = self._logps(trees)
        lengths = [len(ids) for tree in trees for ids in tree.response_ids]
        return GroupRollouts(
            trees, **figures, score_R=score_R, is_finished_R=is_finished, parts_R=scored.parts_R,
            mismatch_nats=mismatch_nats(drawn, figures["logp_N"].split(lengths)),
        )  # fmt: skip

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

    @torch.no_grad()
    def _logps(self, trees: Sequence[Tree]) -> dict[str, Tensor]:
        """Measure all samples under policy and reference, in rollout order."""
        temperature = self.settings.temperature
        found: dict[str, list[Tensor]] = {}
        for batch in self.layout.batches(trees):
            self._stop_as_asked()
            moved = batch.to(self.policy.model.device)
            own = token_logps(self.policy.model, moved, temperature=temperature, with_entropy=True)
            with self.reference.active() as reference_model:
                ref = token_logps(reference_model, moved, temperature=temperature)
            assert own.entropy_N is not None
            sizes = [sum(map(len, tree.response_ids)) for tree in batch.trees]
            parts = [
                values.float().cpu().split(sizes) for values in (own.token_logp_N, ref.token_logp_N, own.entropy_N)
            ]
            for tree, *rows in zip(batch.trees, *parts, strict=True):
                found[tree.record_id] = rows
        rows_of = [found[tree.record_id] for tree in trees]
        names = ("logp_N", "ref_logp_N", "entropy_N")
        return {name: torch.cat([rows[place] for rows in rows_of]) for place, name in enumerate(names)}

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
