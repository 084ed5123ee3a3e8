"""Supervised fine-tuning: cross-entropy on response tokens and their end-of-turn token.

L = -sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t, the token mean over the whole step (methods 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import Figure, StepLoss
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.trained_model import TrainedModel


class SftRecipe(OfflineRows):
    """Trains a causal language model on demonstrations."""

    def __init__(self, policy: TrainedModel, plan: DataPlan, layout: Layout) -> None:
        """Take the model and its rows."""
        super().__init__(policy, plan, layout)
        self.policy = policy

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the token mean over all of the step's counted tokens."""
        num_tokens = sum(member.num_counted for member in step_batches)
        nll = -token_logps(self.policy.model, batch).token_logp_N.sum()
        figures = {
            "nll_per_token_nats": Figure(float(nll.detach()), batch.num_counted),
            "tokens": Figure(batch.num_counted, 1 / len(step_batches)),
        }
        return StepLoss(nll / num_tokens, figures)
