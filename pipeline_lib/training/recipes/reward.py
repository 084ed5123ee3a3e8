"""The reward model: a scalar head read at the last token, trained on comparisons.

Every comparison's K responses go through one forward as one prompt tree, and the loss sees all of
them at once; the formula is a plug-in of `losses/reward`. Ties are no pair. A safety model may learn
beside it which responses are safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline_lib.errors import DataError
from pipeline_lib.losses.reward.contract import RewardLoss
from pipeline_lib.losses.reward.safety import Safety
from pipeline_lib.models.heads import scores
from pipeline_lib.models.scoring import Layout
from pipeline_lib.schema import Record, Strength
from pipeline_lib.text.encode import place_of
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.ranking import RankedPairs
from pipeline_lib.training.recipe import Figure, ParameterGroup, StepLoss
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.trained_model import TrainedModel


@dataclass(frozen=True)
class Label:
    """What people said of a comparison."""

    ranks: tuple[int, ...]
    """One a response, 1 the best, equal numbers are ties."""
    strength: Strength | None = None
    weight: float = 1.0
    is_safe: tuple[bool, ...] = ()
    """One a response; empty where the row does not say."""

    @classmethod
    def of(cls, record: Record, safety: Safety | None = None) -> Label:
        """Take a record's label, and where asked for what it says of safety.

        Raises:
            DataError: Its tags say two things of what is safe.
        """
        if safety is None:
            return cls(record.ranks, record.strength, record.weight)
        try:
            is_safe = safety.labels(record.ranks, record.tags)
        except ValueError as error:
            raise DataError(
                f"{place_of(record)}: {error}", next_step="give the row one of the tags of reward.safety"
            ) from None
        return cls(record.ranks, record.strength, record.weight, is_safe)

    @cached_property
    def rank_K(self) -> Tensor:
        """The ranks as a tensor, on the CPU."""
        return torch.tensor(self.ranks)


Labels = dict[str, Label]
"""The label of each comparison, by record id."""


class RewardRecipe(OfflineRows):
    """Trains a scalar head and its backbone on comparisons."""

    def __init__(
        self,
        reward_model: TrainedModel,
        plan: DataPlan,
        layout: Layout,
        *,
        objective: RewardLoss,
        labels: Labels,
        safety: Safety | None = None,
    ) -> None:
        """Take the model, its rows, the formula, what people said of the rows, and the safety loss if there is one."""
        super().__init__(reward_model, plan, layout)
        self.reward_model, self.objective, self.labels = reward_model, objective, labels
        self.safety = safety
        self._weights: dict[str, float] = {}

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the adapters (or all weights) and the head."""
        rate = self.plan.settings.optimizer.learning_rate
        return [self.reward_model.group("reward_model", learning_rate=rate)]

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the objective's sum over the batch, divided by the weight of the whole step."""
        score_R = scores(self.reward_model.model, batch)
        loss = score_R.sum() * 0.0  # a batch of nothing but ties has a gradient too, of 0
        first = 0
        for tree in batch.trees:
            num = len(tree.response_ids)
            loss = loss + self._of_prompt(score_R[first : first + num], tree.record_id)[0]
            first += num
        step_weight = sum(self._weight(tree.record_id) for member in step_batches for tree in member.trees)
        # A step of nothing but ties may weigh nothing, and then has a loss of 0.
        loss, figures = loss / (step_weight or 1.0), self._figures(batch, score_R.detach())
        if self.safety is None:
            return StepLoss(loss, figures)
        labelled = [self.labels[tree.record_id] for member in step_batches for tree in member.trees]
        divisor = sum(label.weight * len(label.is_safe) for label in labelled)
        classification = self._classification(self.safety, batch, score_R) / (divisor or 1.0)
        return StepLoss(loss + classification, figures | self._safety_figures(batch, score_R.detach()))

    def _classification(self, safety: Safety, batch: TreeBatch, score_R: Tensor) -> Tensor:
        """Return the weighted sum of the safety loss over a batch's labelled responses."""
        total = score_R.sum() * 0.0
        rows_K = score_R.split([len(tree.response_ids) for tree in batch.trees])
        for tree, scores_K in zip(batch.trees, rows_K, strict=True):
            label = self.labels[tree.record_id]
            if label.is_safe:
                total = total + safety.of_prompt(scores_K, label.is_safe, weight=label.weight)
        return total

    def _safety_figures(self, batch: TreeBatch, score_R: Tensor) -> dict[str, Figure]:
        """Return how often sigma(score) above 1/2 says of a labelled response what people do."""
        rows_K = score_R.split([len(tree.response_ids) for tree in batch.trees])
        is_right = [
            (score > 0) == is_safe
            for tree, scores_K in zip(batch.trees, rows_K, strict=True)
            for score, is_safe in zip(scores_K.tolist(), self.labels[tree.record_id].is_safe, strict=False)  # or none
        ]
        return {"safety_accuracy_frac": Figure(float(sum(is_right)), len(is_right))}

    def _of_prompt(self, scores_K: Tensor, record_id: str) -> tuple[Tensor, float]:
        label = self.labels[record_id]
        return self.objective.of_prompt(
            scores_K, label.rank_K.to(scores_K.device), strength=label.strength, weight=label.weight
        )

    def _weight(self, record_id: str) -> float:
        """Return what a row adds to the step's divisor: it depends on the label alone, not on scores."""
        if record_id not in self._weights:
            nothing_K = torch.zeros(len(self.labels[record_id].ranks))
            self._weights[record_id] = self._of_prompt(nothing_K, record_id)[1]
        return self._weights[record_id]

    def _figures(self, batch: TreeBatch, score_R: Tensor) -> dict[str, Figure]:
        pairs = RankedPairs.of(batch, {tree.record_id: self.labels[tree.record_id].ranks for tree in batch.trees})
        margin_P = score_R[pairs.better_P] - score_R[pairs.worse_P]
        count = int(margin_P.numel())
        return {
            "accuracy_frac": Figure(float((margin_P > 0).sum()), count),
            "margin": Figure(float(margin_P.sum()), count),
            "score": Figure(float(score_R.sum()), batch.num_responses),
        }
