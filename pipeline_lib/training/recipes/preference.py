"""Preference losses (DPO and its family, rankings, unpaired labels) through one recipe.

The formula is a plug-in of `losses/preference` in one of three forms: on all (better, worse) pairs of
a prompt's responses, on its ranked list, or on single responses with a label. A prompt and its K
responses are one tree, so each is computed once whatever the form. The log-probabilities of the
reference come out of an artifact; at step 0 the policy is its reference, which is asserted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.losses.preference.contract import PairLogps, RankedLogps, UnpairedLogps
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.scoring import Layout, response_logps
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.divergence import token_logps_and_kl
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.preferences import Judgement
from pipeline_lib.training.ranking import RankedPairs
from pipeline_lib.training.recipe import Figure, StepLoss
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.trained_model import TrainedModel

ReferenceLogps = dict[str, tuple[float, ...]]
"""Sequence log-probability of each response under the reference, by record id."""

START_TOLERANCE_NATS_PER_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""How far log-ratios may be from 0 at step 0: rounding differs by this much in another batch layout."""


class PreferenceRecipe(OfflineRows):
    """Trains a policy on comparisons, or on labelled responses, against a fixed reference or without one."""

    def __init__(
        self,
        policy: TrainedModel,
        plan: DataPlan,
        layout: Layout,
        *,
        objective: Any,
        judgements: Mapping[str, Judgement],
        reference: ReferenceLogps | None,
        mismatched: Mapping[str, Tree] | None = None,
        reference_model: Reference | None = None,
    ) -> None:
        """Take the model, its rows, the formula and what it needs.

        Args:
            policy: The model that is trained.
            plan: Rows as trees of K responses.
            layout: How trees become forwards.
            objective: A plug-in of `losses/preference`.
            judgements: Ranks, rewards and labels by record id.
            reference: The reference's figures; None for losses without a reference.
            mismatched: By record id, its prompt with another row's response: for unpaired losses.
            reference_model: The reference itself, for losses that need its whole distribution.
        """
        super().__init__(policy, plan, layout)
        self.policy, self.objective, self.judgements = policy, objective, judgements
        self.reference, self.reference_model = reference, reference_model
        self.mismatched = mismatched or {}
        self._kl_logps: tuple[Tensor, Tensor] | None = None

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Return the forwards of a step; for unpaired losses, measure the KL of its mismatched rows first."""
        if self.objective.form == "unpaired":
            self._kl_logps = self._score_mismatched(self.plan.rows(step))
        return super().micro_batches(step)

    def held_out_loss(self) -> float | None:
        """Return the loss of the held-out rows, with a reference point of their own."""
        if self.objective.form == "unpaired" and self.plan.held_out:
            self._kl_logps = self._score_mismatched(self.plan.held_out)
        return super().held_out_loss()

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the weighted mean of the objective over the step's pairs, lists or responses."""
        logp_R, kl_R = self._forward(batch)
        reference_R = self._reference_of(batch, logp_R)
        total, figures = self._objective(batch, logp_R, reference_R, kl_R)
        whole = sum(self._weight(member) for member in step_batches)
        return StepLoss(total / max(whole, 1e-12), {**figures, **self._figures(batch, logp_R, reference_R)})

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:
        """Check that the policy starts as its reference, unless what was put in front of it is new.

        Raises:
            DivergedError: The log-ratios are not 0 at step 0.
        """
        if self.reference is None or not self.policy.starts_as_reference:
            return
        apart = figures["log_ratio_abs_nats_per_token"]
        if self.settings.neftune_alpha is not None:
            apart = self._apart_without_noise(step)
        tolerance = START_TOLERANCE_NATS_PER_TOKEN.get(self.policy.model.dtype, 5e-3)
        if apart > tolerance:
            raise DivergedError(
                f"at step {step} policy and reference differ by {apart:.1e} nats a token, more than {tolerance:.0e}; "
                "they must be one model",
                next_step="the reference log-probabilities belong to another model: run `prefline fsck`",
            )

    @torch.no_grad()
    def _apart_without_noise(self, step: int) -> float:
        """Measure a step's first forward once more: noise on the embeddings moves the policy alone."""
        batch = self.layout.batches(self.plan.rows(step))[0].to(self.policy.model.device)
        logp_R, _ = self._forward(batch)
        return float((logp_R - self._reference_of(batch, logp_R)).abs().sum()) / batch.num_counted

    def _forward(self, batch: TreeBatch) -> tuple[Tensor, Tensor | None]:
        """Return each response's log-probability, and its KL from the reference where the objective asks."""
        if self.objective.needs_target_kl:
            assert self.reference_model is not None, "the objective needs the reference's distribution"
            token_logp_N, kl_N = token_logps_and_kl(self.policy.model, self.reference_model, batch)
            return batch.sum_by_response(token_logp_N), batch.sum_by_response(kl_N)
        return batch.sum_by_response(token_logps(self.policy.model, batch).token_logp_N), None

    def _reference_of(self, batch: TreeBatch, like_R: Tensor) -> Tensor:
        if self.reference is None:
            return torch.zeros_like(like_R, requires_grad=False)
        rows = [logp for tree in batch.trees for logp in self.reference[tree.record_id]]
        return torch.tensor(rows, dtype=like_R.dtype, device=like_R.device)

    def _objective(
        self, batch: TreeBatch, logp_R: Tensor, reference_R: Tensor, kl_R: Tensor | None
    ) -> tuple[Tensor, dict[str, Figure]]:
        """Return the weighted sum of the objective over a batch."""
        match self.objective.form:
            case "pair":
                return self._on_pairs(batch, logp_R, reference_R, kl_R), {}
            case "list":
                return self._on_lists(batch, logp_R, reference_R, kl_R), {}
            case _:
                return self._on_responses(batch, logp_R, reference_R)

    def _on_pairs(self, batch: TreeBatch, logp_R: Tensor, reference_R: Tensor, kl_R: Tensor | None) -> Tensor:
        pairs = RankedPairs.of(batch, self._ranks)
        better, worse = pairs.better_P, pairs.worse_P
        score_R = logp_R.new_tensor([score for tree in batch.trees for score in self.judgements[tree.record_id].scores])
        loss_B: Tensor = self.objective.per_pair(
            PairLogps(
                chosen_B=logp_R[better], rejected_B=logp_R[worse],
                ref_chosen_B=reference_R[better], ref_rejected_B=reference_R[worse],
                chosen_tokens_B=batch.lengths_R[better], rejected_tokens_B=batch.lengths_R[worse],
                chosen_kl_B=None if kl_R is None else kl_R[better],
                reward_gap_B=score_R[better] - score_R[worse],
            )
        )  # fmt: skip
        weights = [self.judgements[tree.record_id].weight for tree in batch.trees]
        weight_R = logp_R.new_tensor(weights).repeat_interleave(
            torch.tensor([len(tree.response_ids) for tree in batch.trees], device=logp_R.device)
        )
        return (loss_B * weight_R[better]).sum()

    def _on_lists(self, batch: TreeBatch, logp_R: Tensor, reference_R: Tensor, kl_R: Tensor | None) -> Tensor:
        total, first = logp_R.new_zeros(()), 0
        for tree in batch.trees:
            judged = self.judgements[tree.record_id]
            part = slice(first, first + len(tree.response_ids))
            first = part.stop
            rank_K = torch.tensor(judged.ranks, device=logp_R.device)
            ranked = RankedLogps(
                logp_K=logp_R[part], ref_logp_K=reference_R[part], tokens_K=batch.lengths_R[part], rank_K=rank_K,
                reward_K=logp_R.new_tensor(judged.rewards),
                target_kl=None if kl_R is None else kl_R[part][rank_K == rank_K.min()].mean(),
            )  # fmt: skip
            total = total + judged.weight * self.objective.of_list(ranked)
        return total

    def _on_responses(self, batch: TreeBatch, logp_R: Tensor, reference_R: Tensor) -> tuple[Tensor, dict[str, Figure]]:
        assert self._kl_logps is not None, "a step begins with its mismatched rows"
        kl_M, ref_kl_M = (values.to(logp_R) for values in self._kl_logps)
        labels = [label for tree in batch.trees for label in self.judgements[tree.record_id].is_desirable]
        loss_R = self.objective.per_response(
            UnpairedLogps(
                logp_B=logp_R, ref_logp_B=reference_R, is_desirable_B=torch.tensor(labels, device=logp_R.device),
                kl_logp_M=kl_M, kl_ref_logp_M=ref_kl_M, tokens_B=batch.lengths_R,
            )
        )  # fmt: skip
        weights = [self.judgements[tree.record_id].weight for tree in batch.trees for _ in tree.response_ids]
        reference_point = max(0.0, float((kl_M - ref_kl_M).mean()))
        figures = {"kl_reference_point_nats": Figure(reference_point * len(batch.trees), len(batch.trees))}
        return (loss_R * logp_R.new_tensor(weights)).sum(), figures

    @torch.no_grad()
    def _score_mismatched(self, rows: Sequence[Tree]) -> tuple[Tensor, Tensor]:
        assert self.reference is not None, "unpaired losses have a reference"
        trees = [self.mismatched[tree.record_id] for tree in rows]
        found = response_logps(self.policy.model, trees, self.layout)
        own = [found[tree.record_id][0] for tree in trees]
        reference = [self.reference[tree.record_id][0] for tree in trees]
        # Wide until they meet the policy's own format, which may be float64.
        return torch.tensor(own, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)

    @property
    def _ranks(self) -> dict[str, tuple[int, ...]]:
        return {record_id: judged.ranks for record_id, judged in self.judgements.items()}

    def _weight(self, batch: TreeBatch) -> float:
        """Return what a batch adds to the divisor of the step: the weights of its pairs, lists or responses."""
        judged = [self.judgements[tree.record_id] for tree in batch.trees]
        match self.objective.form:
            case "pair":
                return sum(each.weight * _num_pairs(each.ranks) for each in judged)
            case "list":
                return sum(each.weight for each in judged)
            case _:
                return sum(each.weight * len(each.ranks) for each in judged)

    def _figures(self, batch: TreeBatch, logp_R: Tensor, reference_R: Tensor) -> dict[str, Figure]:
        """Return the implicit rewards' figures: log-ratios, or log-probabilities a token without a reference."""
        pairs = RankedPairs.of(batch, self._ranks)
        count = int(pairs.better_P.numel())
        ratio_R = (logp_R - reference_R).detach()
        if self.reference is None:
            mean_R = ratio_R / batch.lengths_R.clamp(min=1)
            better_P, worse_P = mean_R[pairs.better_P], mean_R[pairs.worse_P]
            return {
                "accuracy_frac": Figure(float((better_P > worse_P).sum()), count),
                "logp_chosen_nats_per_token": Figure(float(better_P.sum()), count),
                "logp_rejected_nats_per_token": Figure(float(worse_P.sum()), count),
            }
        better_P, worse_P = ratio_R[pairs.better_P], ratio_R[pairs.worse_P]
        return {
            "accuracy_frac": Figure(float((better_P > worse_P).sum()), count),
            "log_ratio_chosen_nats": Figure(float(better_P.sum()), count),
            "log_ratio_rejected_nats": Figure(float(worse_P.sum()), count),
            "log_ratio_margin_nats": Figure(float((better_P - worse_P).sum()), count),
            "log_ratio_abs_nats_per_token": Figure(float(ratio_R.abs().sum()), batch.num_counted),
        }


def _num_pairs(ranks: Sequence[int]) -> int:
    return sum(one < other for one in ranks for other in ranks)
