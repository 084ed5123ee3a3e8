"""Preference losses on pairs (DPO and its family) through one recipe.

The formula is a plug-in of `losses/preference`; the log-probabilities of the reference come out of
an artifact, computed once. At step 0 the policy is its reference: the first loss is asserted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline_lib.errors import DivergedError
from pipeline_lib.losses.preference.contract import PairLogps, PreferenceLoss
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import Figure, ParameterGroup, StepLoss
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.trained_model import TrainedModel

ReferenceLogps = dict[str, tuple[float, ...]]
"""Sequence log-probability of each response under the reference, by record id."""

START_TOLERANCE_NATS_PER_TOKEN = 5e-3
"""How far log-ratios may be from 0 at step 0: bf16 differs by this much in another batch layout."""


class PreferenceRecipe(OfflineRows):
    """Trains a policy on (chosen, rejected) pairs against a fixed reference."""

    def __init__(
        self,
        policy: TrainedModel,
        plan: DataPlan,
        layout: Layout,
        *,
        objective: PreferenceLoss,
        reference: ReferenceLogps,
    ) -> None:
        """Take the model, pairs (chosen first), the formula and the reference's figures."""
        super().__init__(policy, plan, layout)
        self.policy, self.objective, self.reference = policy, objective, reference

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the policy's parameters."""
        return [self.policy.group("policy", learning_rate=self.plan.settings.optimizer.learning_rate)]

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the mean of the objective over the step's pairs."""
        total_pairs = sum(len(member.trees) for member in step_batches)
        logp_R = batch.sum_by_response(token_logps(self.policy.model, batch).token_logp_N)
        reference_R = torch.tensor(
            [logp for tree in batch.trees for logp in self.reference[tree.record_id]],
            dtype=logp_R.dtype, device=logp_R.device,
        )  # fmt: skip
        pairs = PairLogps(
            chosen_B=logp_R[0::2], rejected_B=logp_R[1::2],
            ref_chosen_B=reference_R[0::2], ref_rejected_B=reference_R[1::2],
            chosen_tokens_B=batch.lengths_R[0::2], rejected_tokens_B=batch.lengths_R[1::2],
        )  # fmt: skip
        loss_B = self.objective.per_pair(pairs)
        ratio_R = (logp_R - reference_R).detach()
        chosen_B, rejected_B = ratio_R[0::2], ratio_R[1::2]
        count = len(batch.trees)
        figures = {
            "accuracy_frac": Figure(float((chosen_B > rejected_B).sum()), count),
            "log_ratio_chosen_nats": Figure(float(chosen_B.sum()), count),
            "log_ratio_rejected_nats": Figure(float(rejected_B.sum()), count),
            "log_ratio_margin_nats": Figure(float((chosen_B - rejected_B).sum()), count),
            "log_ratio_abs_nats_per_token": Figure(float(ratio_R.abs().sum()), batch.num_counted),
        }
        return StepLoss(loss_B.sum() / total_pairs, figures)

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:
        """Check that the policy starts as its reference.

        Raises:
            DivergedError: The log-ratios are not 0 at step 0.
        """
        apart = figures["log_ratio_abs_nats_per_token"]
        if apart > START_TOLERANCE_NATS_PER_TOKEN:
            raise DivergedError(
                f"at step {step} policy and reference differ by {apart:.4f} nats a token; they must be one model",
                next_step="the reference log-probabilities belong to another model: run `prefline fsck`",
            )
