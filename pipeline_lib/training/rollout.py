"""Rollouts: sampled responses with everything that training on them needs to know.

Legend: G prompts, K samples of each (PPO: one), R = G K responses, prompt by prompt; N tokens of all
responses, flat in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

from pipeline_lib.text.encode import Tree

_IDS = ("prompt_ids", "prompt_lengths", "response_ids", "lengths_R")
_PART = "part:"


@dataclass(frozen=True)
class Rollouts:
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
    full_kl_N: Tensor | None = None
    """KL(policy || reference) over all words at each token, nats."""
    heldout_score_R: Tensor | None = None
    """Normalised score of a reward model that the policy is not trained against."""
    parts_R: dict[str, Tensor] = field(default_factory=dict)
    """What the score is made of, by name, a number a response or one of all; empty where it has no parts."""
    mismatch_nats: Tensor | None = None
    """Mean difference a token between the log-probabilities of sampler and trainer; None where they are one model."""

    @property
    def samples_per_prompt(self) -> int:
        """K."""
        return len(self.trees[0].response_ids)

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """The tokens of each response."""
        return [ids for tree in self.trees for ids in tree.response_ids]

    @property
    def lengths_R(self) -> list[int]:
        """Tokens of each response."""
        return [len(ids) for ids in self.responses]

    def rows(self, values_N: Tensor) -> list[Tensor]:
        """Split a figure of every token into one tensor a response."""
        return list(values_N.split(self.lengths_R))

    def by_tree(self, values_N: Tensor) -> list[Tensor]:
        """Split a figure of every token into one tensor a prompt."""
        return list(values_N.split([sum(map(len, tree.response_ids)) for tree in self.trees]))

    def groups(self, values_R: Tensor) -> Tensor:
        """Lay a figure of every response out as (G, K)."""
        return values_R.view(len(self.trees), self.samples_per_prompt)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole as tensors, for a checkpoint."""
        figures = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            **{name: value for name, value in figures.items() if isinstance(value, Tensor)},
            **{_PART + name: value for name, value in self.parts_R.items()},
            "prompt_ids": torch.tensor([token for tree in self.trees for token in tree.prompt_ids]),
            "prompt_lengths": torch.tensor([len(tree.prompt_ids) for tree in self.trees]),
            "response_ids": torch.tensor([token for ids in self.responses for token in ids]),
            "lengths_R": torch.tensor(self.lengths_R),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Take the whole back from a checkpoint's tensors."""
        prompts = [row.tolist() for row in tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())]
        responses = [row.tolist() for row in tensors["response_ids"].split(tensors["lengths_R"].tolist())]
        samples = len(responses) // len(prompts)
        trees = tuple(
            rollout_tree(index, prompt, *responses[index * samples : (index + 1) * samples])
            for index, prompt in enumerate(prompts)
        )
        parts = {name.removeprefix(_PART): value for name, value in tensors.items() if name.startswith(_PART)}
        figures = {name: value for name, value in tensors.items() if name not in _IDS and not name.startswith(_PART)}
        return cls(trees, **figures, parts_R=parts)


@dataclass(frozen=True, kw_only=True)
class ValuedRollouts(Rollouts):
    """One response a prompt, as PPO has them, with what the value function says of every token."""

    value_N: Tensor
    """The value function before each token, reward units."""

    def padded(self, values_N: Tensor, members: list[int]) -> Tensor:
        """Lay a flat figure out as `(len(members), T)`, zeros on the right."""
        rows = self.rows(values_N)
        return torch.nn.utils.rnn.pad_sequence([rows[index] for index in members], batch_first=True)

    def mask(self, members: list[int]) -> Tensor:
        """Return which places of `padded` are response tokens."""
        lengths = torch.tensor([self.lengths_R[index] for index in members])
        return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]


def rollout_tree(index: int, prompt_ids: Sequence[int], *responses: Sequence[int]) -> Tree:
    """Return a prompt and its samples as a tree; nothing of the prompt counts."""
    return Tree(str(index), tuple(prompt_ids), tuple(map(tuple, responses)), (False,) * len(prompt_ids))


def gather_rows(rows: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    """Return the numbers of some rollouts behind one another, in the order of `members`."""
    return torch.cat([rows[index] for index in members])
