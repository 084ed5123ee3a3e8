"""Rollouts of K samples a prompt: drawn, scored and kept as prompt trees, the prompt once.

Legend: G prompts, K samples of each, R = G K responses, prompt by prompt; N tokens of all responses,
flat in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.precision import default_device
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import Layout, response_scores
from pipeline_lib.schema import Record
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Encoder, Tree
from pipeline_lib.training.critic import Normalization
from pipeline_lib.training.recipe import StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, dtype_for

_INTS = ("prompt_ids", "prompt_lengths_G", "response_ids", "lengths_R")
_SHOWN = 8


class GroupScorer(Protocol):
    """Gives every sample its score: the one place where the reward comes from."""

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor:
        """Return the score of every response, `(R,)`, prompt by prompt.

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
        return {
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
        return cls(trees, **{name: value for name, value in tensors.items() if name not in _INTS})


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

    def collect(self, prompts: Sequence[Tree], *, seed: int, where: str) -> GroupRollouts:
        """Return the rollouts of some prompts, a function of (seed, prompts, weights).

        Args:
            prompts: Trees without responses.
            seed: Seed of the samples.
            where: The iteration, for messages.

        Raises:
            StopRequestedError: The process was asked to end; nothing has changed.
            DivergedError: There is not one finite score a response.
        """

        def on_batch(done: int) -> None:
            self.on_text(f"{where}: sampled {done}/{len(prompts)} prompts")
            self._stop_as_asked()

        drawn = sample(
            self.policy.model, [tree.prompt_ids for tree in prompts], self.settings, eos_id=self.chat.eos_id,
            pad_id=self.chat.pad_id, seed=seed, samples_per_prompt=self.samples_per_prompt, on_batch=on_batch,
        )  # fmt: skip
        size = self.samples_per_prompt
        trees = tuple(
            group_tree(index, tree.prompt_ids, [one.ids for one in drawn[index * size : (index + 1) * size]])
            for index, tree in enumerate(prompts)
        )
        self.on_text(f"{where}: scoring {len(drawn)} responses")
        is_finished = [one.is_finished for one in drawn]
        score_R = self.scorer.score(prompts, trees, is_finished).float().cpu()
        self._require_scores(score_R, prompts, where)
        return GroupRollouts(trees, **self._logps(trees), score_R=score_R, is_finished_R=torch.tensor(is_finished))

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

    def _require_scores(self, score_R: Tensor, prompts: Sequence[Tree], where: str) -> None:
        if score_R.shape != (len(prompts) * self.samples_per_prompt,):
            raise DivergedError(
                f"{where}: the reward gave {tuple(score_R.shape)} scores for "
                f"{len(prompts)} x {self.samples_per_prompt} responses",
                next_step="a reward must give one score a response",
            )
        bad = (~torch.isfinite(score_R)).nonzero().flatten().tolist()
        if not bad:
            return
        ids = list(dict.fromkeys(prompts[place // self.samples_per_prompt].record_id for place in bad))
        raise DivergedError(
            f"{where}: {len(bad)} of {score_R.numel()} scores are not finite; rows of their prompts: "
            + ", ".join(name[:12] for name in ids[:_SHOWN]),
            next_step="look at what the reward gives on these prompts",
            row_ids=tuple(ids),
        )
