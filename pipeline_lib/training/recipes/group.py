"""RLOO (Ahmadian et al. 2024) and GRPO (Shao et al. 2024): policy gradient on groups of samples.

An iteration draws K samples of each prompt, scores them, and makes `mu * minibatches` optimizer
steps on them. A sample's advantage is measured by the other samples of its prompt, so there is no
value function. A prompt and its samples are one prompt tree: the prompt is computed once. When it
samples is `recipes/online.py`, how is `training/sampling_rollouts.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.losses.group import GroupLoss, grpo_loss, rloo_loss, token_weights
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.scoring import Layout
from pipeline_lib.rl.group_advantage import alike_frac, group_normalized, leave_one_out
from pipeline_lib.rl.kl import kl_estimate
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.forward import training_forward
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings
from pipeline_lib.training.iteration_figures import iteration_figures, shaped_scores, sum_by_response
from pipeline_lib.training.recipe import Figure, ParameterGroup, StepLoss
from pipeline_lib.training.recipes.online import OnSpeed, OwnSamples
from pipeline_lib.training.rollout import Rollouts, gather_rows
from pipeline_lib.training.sampling_rollouts import GroupSampler


class GroupRecipe(OwnSamples[Rollouts, RlooSettings | GrpoSettings]):
    """Trains a policy on groups of its own samples, by RLOO or GRPO as the settings' class says."""

    order_scope = "group"
    kl_advice = "raise beta, or lower optimizer.learning_rate or mu"

    def __init__(
        self,
        sampler: GroupSampler,
        prompts: Sequence[Tree],
        *,
        settings: RlooSettings | GrpoSettings,
        layout: Layout,
        on_speed: OnSpeed = lambda *_: None,
    ) -> None:
        """Take what draws and scores samples, the prompts (trees without responses) and the settings.

        Args:
            sampler: Draws and scores samples.
            prompts: Trees without responses.
            settings: Of RLOO or GRPO.
            layout: How rows become forwards.
            on_speed: Told tokens a second.

        Raises:
            DataError: Prompts that nothing can be sampled after.
        """
        super().__init__(
            sampler.policy, prompts, Rollouts, settings=settings, passes=settings.mu, layout=layout, chat=sampler.chat,
            scorer=sampler.scorer, on_text=sampler.on_text, on_speed=on_speed,
        )  # fmt: skip
        self.sampler = sampler
        self._advantage_GK = torch.zeros(0, settings.samples_per_prompt)

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the policy's parameters."""
        return [self.policy.group("policy", learning_rate=self.settings.optimizer.learning_rate)]

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Sample where an iteration begins; return the forwards of the step's minibatch."""
        members = self.minibatch(step)
        rollouts = self._current()
        self._advantage_GK = self._advantages(rollouts)
        if step == 0 and not bool(self._advantage_GK[members].any()):
            raise DivergedError(
                f"in the first step's {len(members)} prompts all samples of a prompt have the same reward: "
                "there is nothing to learn from",
                next_step="raise samples_per_prompt, batch_size or temperature, or choose a reward that tells "
                "samples apart",
            )
        return self.layout.batches([rollouts.trees[index] for index in members])

    def training_forward(self, batch: TreeBatch) -> AbstractContextManager[None]:
        """Return the context of a forward that is trained on."""
        return training_forward([self.policy.model], batch, gradient_checkpointing=self.settings.gradient_checkpointing)

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the batch's share of the step's loss, normalised over the whole step."""
        rollouts = self._current()
        members = [int(tree.record_id) for tree in batch.trees]
        device = batch.label_N.device
        old_N = gather_rows(rollouts.by_tree(rollouts.logp_N), members).to(device)
        ref_N = gather_rows(rollouts.by_tree(rollouts.ref_logp_N), members).to(device)
        advantage_R = self._advantage_GK[members].flatten().to(device)
        new_N = token_logps(self.policy.model, batch, temperature=self.settings.temperature).token_logp_N
        kl_N = kl_estimate(new_N, ref_N, estimator="k3")
        found = self._objective(batch, step_batches, new_N, old_N, kl_N, advantage_R)
        apart_N = (new_N - old_N).detach()
        tokens, responses = batch.num_counted, batch.num_responses
        units = responses if isinstance(self.settings, RlooSettings) else tokens
        # Parts of a sum, not of a mean: their counts add up to 1 over the step.
        share = tokens / sum(member.num_counted for member in step_batches)
        figures = {
            "policy_loss": Figure(float(found.loss_sum.detach()) - found.kl_loss, share),
            "kl_loss": Figure(found.kl_loss, share),
            "clip_frac": Figure(found.num_clipped, units),
            "approx_kl_nats": Figure(float(0.5 * apart_N.square().sum()), tokens),
            "policy_kl_nats": Figure(float(-apart_N.sum()), tokens),
            "log_ratio_abs_nats": Figure(float(apart_N.abs().sum()), tokens),
            "kl_k3_nats_per_token": Figure(float(kl_N.detach().sum()), tokens),
        }
        return StepLoss(found.loss_sum, figures)

    def _objective(
        self,
        batch: TreeBatch,
        step_batches: Sequence[TreeBatch],
        new_N: Tensor,
        old_N: Tensor,
        kl_N: Tensor,
        advantage_R: Tensor,
    ) -> GroupLoss:
        settings = self.settings
        num_responses = sum(member.num_responses for member in step_batches)
        if isinstance(settings, RlooSettings):
            logp_R, old_R = batch.sum_by_response(new_N), batch.sum_by_response(old_N)
            return rloo_loss(logp_R, old_R, advantage_R, num_responses=num_responses, clip_range=settings.clip_range)
        weight_N = token_weights(
            batch.lengths_R, norm=settings.loss_norm, num_responses=num_responses,
            num_tokens=sum(member.num_counted for member in step_batches), constant=settings.max_new_tokens,
        )  # fmt: skip
        advantage_N = advantage_R[batch.response_N]
        return grpo_loss(new_N, old_N, kl_N, advantage_N, weight_N, beta=settings.beta, clip_range=settings.clip_range)

    def rewards(self, rollouts: Rollouts) -> Tensor:
        """Return what the advantages are made of, `(G, K)`: scores after the missing-EOS rule, for RLOO less the KL."""
        score_R = shaped_scores(rollouts, self.settings)
        if isinstance(self.settings, RlooSettings):
            score_R = score_R - self.settings.beta * sum_by_response(rollouts, rollouts.logp_N - rollouts.ref_logp_N)
        return rollouts.groups(score_R)

    def _advantages(self, rollouts: Rollouts) -> Tensor:
        reward_GK = self.rewards(rollouts)
        if isinstance(self.settings, RlooSettings):
            return leave_one_out(reward_GK)
        return group_normalized(reward_GK, scale=self.settings.scale)

    def _collect(self, iteration: int) -> Rollouts:
        seed = derive_seed(self.settings.seed, "rollout", iteration)
        where = f"iteration {iteration + 1}/{self.settings.iterations}"
        return self.sampler.collect(self.plan.full_batch(iteration), seed=seed, where=where)

    def _measure(self, iteration: int, rollouts: Rollouts) -> dict[str, float]:
        reward_GK = self.rewards(rollouts)
        return {
            **iteration_figures(iteration, rollouts, self.settings, kl_coef=self.settings.beta),
            "group_std": float(reward_GK.std(1).mean()),
            "alike_frac": alike_frac(reward_GK),
            "best_in_group": float(rollouts.groups(rollouts.score_R).amax(1).mean()),
        }

    def _accept(self, rollouts: Rollouts) -> None:
        """Take note of nothing: advantages are a function of the rollouts."""
