"""Rollouts: sampled responses with everything that PPO needs to know of them.

Legend: N response tokens of all rollouts, flat in rollout order; R rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline_lib.text.encode import Tree

_INTS = ("prompt_ids", "prompt_lengths_R", "response_ids", "lengths_R")
_PART = "part:"


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses of one iteration, scored under policy, reference, value and reward."""

    trees: tuple[Tree, ...]
    """One prompt and its one sampled response each; the record id is the rollout's index."""
    logp_N: Tensor
    """Log-probability under the policy that sampled, at the sampling temperature, nats."""
    ref_logp_N: Tensor
    """Log-probability under the reference, nats."""
    value_N: Tensor
    """The value function before each token, reward units."""
    entropy_N: Tensor
    """Entropy of the policy's prediction, nats."""
    score_R: Tensor
    """Normalised reward-model score of each response, before any missing-EOS rule."""
    is_finished_R: Tensor
    """True where the response ended by itself."""
    full_kl_N: Tensor | None = None
    """KL(policy || reference) over all words at each token, nats."""
    heldout_score_R: Tensor | None = None
    """Normalised score of a reward model that the policy is not trained against."""
    parts_R: dict[str, Tensor] = field(default_factory=dict)
    """What the score is made of, by name, where it has parts."""
    mismatch_nats: Tensor | None = None
    """Mean difference a token between the log-probabilities of sampler and trainer; None where they are one model."""

    @property
    def lengths_R(self) -> list[int]:
        """Tokens of each response."""
        return [len(tree.response_ids[0]) for tree in self.trees]

    def rows(self, values_N: Tensor) -> list[Tensor]:
        """Split a flat figure into one tensor a rollout."""
        return list(values_N.split(self.lengths_R))

    def padded(self, values_N: Tensor, members: list[int]) -> Tensor:
        """Lay a flat figure out as `(len(members), T)`, zeros on the right."""
        rows = self.rows(values_N)
        return torch.nn.utils.rnn.pad_sequence([rows[index] for index in members], batch_first=True)

    def mask(self, members: list[int]) -> Tensor:
        """Return which places of `padded` are response tokens."""
        lengths = torch.tensor([self.lengths_R[index] for index in members])
        return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole as tensors, for a checkpoint."""
        prompts = [torch.tensor(tree.prompt_ids) for tree in self.trees]
        responses = [torch.tensor(tree.response_ids[0]) for tree in self.trees]
        further = {
            "full_kl_N": self.full_kl_N, "heldout_score_R": self.heldout_score_R, "mismatch_nats": self.mismatch_nats,
        }  # fmt: skip
        return {
            **{name: value for name, value in further.items() if value is not None},
            **{_PART + name: value for name, value in self.parts_R.items()},
            "prompt_ids": torch.cat(prompts),
            "prompt_lengths_R": torch.tensor([len(ids) for ids in prompts]),
            "response_ids": torch.cat(responses),
            "lengths_R": torch.tensor([len(ids) for ids in responses]),
            "logp_N": self.logp_N, "ref_logp_N": self.ref_logp_N, "value_N": self.value_N,
            "entropy_N": self.entropy_N, "score_R": self.score_R, "is_finished_R": self.is_finished_R,
        }  # fmt: skip

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rollouts:
        """Take the whole back from a checkpoint's tensors."""
        prompts = tensors["prompt_ids"].split(tensors["prompt_lengths_R"].tolist())
        responses = tensors["response_ids"].split(tensors["lengths_R"].tolist())
        trees = tuple(
            rollout_tree(index, prompt.tolist(), response.tolist())
            for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        )
        parts = {name.removeprefix(_PART): value for name, value in tensors.items() if name.startswith(_PART)}
        figures = {name: value for name, value in tensors.items() if name not in _INTS and not name.startswith(_PART)}
        return cls(trees, **figures, parts_R=parts)


def rollout_tree(index: int, prompt_ids: list[int], response_ids: list[int]) -> Tree:
    """Return a rollout as a tree of one response; nothing of the prompt counts."""
    return Tree(str(index), tuple(prompt_ids), (tuple(response_ids),), (False,) * len(prompt_ids))


def gather_rows(rows: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    """Return the numbers of some rollouts behind one another, in the order of `members`."""
    return torch.cat([rows[index] for index in members])
