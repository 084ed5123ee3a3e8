"""The reward model: Bradley-Terry on a scalar head read at the last token (methods 2.2).

Every comparison's K responses go through one forward as one prompt tree; all pairs with a better
and a worse response count, ties do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline_lib.losses.reward.pairs import bradley_terry
from pipeline_lib.models.heads import scores
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import Figure, ParameterGroup, StepLoss
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.trained_model import TrainedModel

Ranks = dict[str, tuple[int, ...]]
"""Ranks of each comparison's responses, by record id."""


@dataclass(frozen=True)
class RankedPairs:
    """All (better, worse) pairs of a batch as flat response indices."""

    better_P: Tensor
    worse_P: Tensor

    @classmethod
    def of(cls, batch: TreeBatch, ranks: Ranks) -> RankedPairs:
        """List the pairs of every tree of a batch, in tree order."""
        better: list[int] = []
        worse: list[int] = []
        first = 0
        for tree in batch.trees:
            places = ranks[tree.record_id]
            for i, rank_i in enumerate(places):
                for j, rank_j in enumerate(places):
                    if rank_i < rank_j:
                        better.append(first + i)
                        worse.append(first + j)
            first += len(places)
        device = batch.last_R.device
        return cls(
            torch.tensor(better, device=device, dtype=torch.long),
            torch.tensor(worse, device=device, dtype=torch.long),
        )


def num_pairs(batch: TreeBatch, ranks: Ranks) -> int:
    """Count the (better, worse) pairs of a batch."""
    return sum(
        rank_i < rank_j for tree in batch.trees for rank_i in ranks[tree.record_id] for rank_j in ranks[tree.record_id]
    )


class RewardRecipe(OfflineRows):
    """Trains a scalar head and its backbone on comparisons."""

    def __init__(
        self, reward_model: TrainedModel, plan: DataPlan, layout: Layout, *, ranks: Ranks, centring: float
    ) -> None:
        """Take the model, its rows, their ranks, and the weight of the centring term."""
        super().__init__(reward_model, plan, layout)
        self.reward_model, self.ranks, self.centring = reward_model, ranks, centring

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the adapters (or all weights) and the head."""
        rate = self.plan.settings.optimizer.learning_rate
        return [self.reward_model.group("reward_model", learning_rate=rate)]

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the mean of -log sigma(better - worse) over the step's pairs."""
        pairs = RankedPairs.of(batch, self.ranks)
        total_pairs = sum(num_pairs(member, self.ranks) for member in step_batches)
        score_R = scores(self.reward_model.model, batch)
        better_P, worse_P = score_R[pairs.better_P], score_R[pairs.worse_P]
        loss_P = bradley_terry(better_P, worse_P, centring=self.centring)
        count = int(pairs.better_P.numel())
        margin_P = (better_P - worse_P).detach()
        figures = {
            "accuracy_frac": Figure(float((margin_P > 0).sum()), count),
            "margin": Figure(float(margin_P.sum()), count),
            "score": Figure(float(score_R.detach().sum()), batch.num_responses),
        }
        # A step of nothing but ties has no pair, and then a loss of 0.
        return StepLoss(loss_P.sum() / max(1, total_pairs), figures)
