"""Supervised fine-tuning: cross-entropy on response tokens and their end-of-turn token.

L = sum_t w_t nll_t / sum_t w_t over the whole step, the weights by row and by reduction;
plus, where asked for, the KL to the model that training began with, weighted alike, and the
language-model loss on pretraining text. Conditional methods (2.13, 2.14) are this recipe on rows of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline_lib.losses.cross_entropy import CrossEntropy
from pipeline_lib.losses.tokens import (
    full_kl_from_hidden,
    mean_logps_from_hidden,
    smoothed_nll,
    token_logps_from_hidden,
)
from pipeline_lib.models.logprobs import HEAD_CHUNK_TOKENS, token_logps
from pipeline_lib.models.residual import dropped, residual_branches
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.divergence import head_states, reference_states
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.pretraining import PretrainingRows, is_pretraining
from pipeline_lib.training.recipe import Figure, StepLoss
from pipeline_lib.training.recipes.offline import OfflineRows
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.selection import AnswerScore
from pipeline_lib.training.trained_model import TrainedModel


@dataclass(frozen=True)
class KlPenalty:
    """A pull towards the model that training began with: + coef KL(policy || reference) a token."""

    coef: float
    reference: Reference


@dataclass(frozen=True)
class _Terms:
    """What is weighted and summed, for each counted token."""

    logp_N: Tensor
    loss_N: Tensor
    """The smoothed negative log-likelihood."""
    kl_N: Tensor | None


class SftRecipe(OfflineRows):
    """Trains a causal language model on demonstrations."""

    def __init__(
        self,
        policy: TrainedModel,
        plan: DataPlan,
        layout: Layout,
        *,
        objective: CrossEntropy | None = None,
        kl: KlPenalty | None = None,
        pretraining: PretrainingRows | None = None,
        residual_dropout: float = 0.0,
        selection: AnswerScore | None = None,
    ) -> None:
        """Take the model and its rows.

        Args:
            policy: The model that is trained.
            plan: Rows as trees of one response.
            layout: How trees become forwards.
            objective: Reduction and label smoothing; by default the token mean without smoothing.
            kl: Adds the KL to a reference.
            pretraining: Adds the loss on pretraining text.
            residual_dropout: Share of each sub-layer's output that is dropped in forwards that are trained on.
            selection: Scores the weights, where early stopping is not to go by the held-out loss.

        Raises:
            ConfigError: The model has no known place for residual dropout.
        """
        super().__init__(policy, plan, layout)
        self.policy, self.objective = policy, objective or CrossEntropy()
        self.kl, self.pretraining, self.selection = kl, pretraining, selection
        self.residual_dropout = residual_dropout
        self._branches = residual_branches(policy.model) if residual_dropout else []

    @contextmanager
    def training_forward(self, batch: TreeBatch) -> Iterator[None]:
        """Run a forward that is trained on, with dropout."""
        with super().training_forward(batch), dropped(self._branches, self.residual_dropout):
            yield

    def held_out_score(self) -> float | None:
        """Return a reward model's mean score of the model's own answers; None where the held-out loss decides."""
        return None if self.selection is None else self.selection.of(self.policy.model)

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Return the forwards of a step; pretraining text has forwards of its own."""
        batches = list(super().micro_batches(step))
        if self.pretraining is not None:
            batches += self.layout.batches(self.pretraining.rows(step))
        return batches

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return a forward's part of the step's weighted mean; pretraining text has a mean of its own."""
        is_text = is_pretraining(batch)
        peers = [member for member in step_batches if is_pretraining(member) == is_text]
        divisor = self._divisor(peers)
        if is_text:
            assert self.pretraining is not None, "pretraining text without its settings"
            logp_N = token_logps(self.policy.model, batch).token_logp_N
            total = _weighted_sum(-logp_N, self._weights(batch, like=logp_N))
            nll = Figure(-float(logp_N.detach().sum()), batch.num_counted)
            return StepLoss(self.pretraining.coef * total / divisor, {"pretraining_nll_per_token_nats": nll})
        terms = self._terms(batch)
        weight_N = self._weights(batch, like=terms.loss_N)
        total = _weighted_sum(terms.loss_N, weight_N)
        figures = {
            "nll_per_token_nats": Figure(-float(terms.logp_N.detach().sum()), batch.num_counted),
            "tokens": Figure(batch.num_counted, 1 / len(peers)),
        }
        if terms.kl_N is not None:
            assert self.kl is not None
            total = total + self.kl.coef * _weighted_sum(terms.kl_N, weight_N)
            figures["kl_per_token_nats"] = Figure(float(terms.kl_N.detach().sum()), batch.num_counted)
        return StepLoss(total / divisor, figures)

    def _divisor(self, batches: Sequence[TreeBatch]) -> float:
        if self.objective.reduction == "sum":
            return 1.0
        rows = [tree for batch in batches for tree in batch.trees]
        return sum(self.objective.divisor(tree.counted_turns, row_weight=tree.weight) for tree in rows)

    def _weights(self, batch: TreeBatch, *, like: Tensor) -> Tensor | None:
        """Return the weight of each counted token; None where all weigh 1."""
        is_by_token = self.objective.reduction in ("token_mean", "sum")
        if is_by_token and all(tree.weight == 1.0 for tree in batch.trees):
            return None
        values: list[float] = []
        counts: list[int] = []
        for tree in batch.trees:
            assert len(tree.response_ids) == 1, "a row of cross-entropy has one response"
            counts += tree.counted_turns
            values += self.objective.turn_weights(tree.counted_turns, row_weight=tree.weight)
        return like.new_tensor(values).repeat_interleave(torch.tensor(counts, device=like.device))

    def _terms(self, batch: TreeBatch) -> _Terms:
        """Run the model, and the reference where its distribution is needed."""
        model, smoothing = self.policy.model, self.objective.label_smoothing
        if self.kl is None and not smoothing:
            logp_N = token_logps(model, batch).token_logp_N
            return _Terms(logp_N, -logp_N, None)
        # The reference runs before the policy: inside its block the adapters are off.
        ref = None if self.kl is None else reference_states(self.kl.reference, batch)
        states = head_states(model, batch)
        logp_N, _ = token_logps_from_hidden(
            states.hidden_ND, states.weight_VD, batch.label_N, head_bias_V=states.bias_V, softcap=states.softcap,
            chunk_tokens=HEAD_CHUNK_TOKENS,
        )  # fmt: skip
        loss_N = -logp_N
        if smoothing:
            mean_N = mean_logps_from_hidden(
                states.hidden_ND, states.weight_VD, batch.label_N, logp_N, head_bias_V=states.bias_V,
                softcap=states.softcap, chunk_tokens=HEAD_CHUNK_TOKENS,
            )  # fmt: skip
            loss_N = smoothed_nll(logp_N, mean_N, label_smoothing=smoothing)
        if ref is None:
            return _Terms(logp_N, loss_N, None)
        return _Terms(logp_N, loss_N, full_kl_from_hidden(states, ref, chunk_tokens=HEAD_CHUNK_TOKENS))


def _weighted_sum(values_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return values_N.sum() if weight_N is None else (values_N * weight_N).sum()
