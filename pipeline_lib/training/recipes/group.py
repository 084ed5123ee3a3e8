"""RLOO (Ahmadian et al. 2024) and GRPO (Shao et al. 2024): policy gradient on groups of samples.

An iteration draws K samples of each prompt, scores them, and makes `mu * minibatches` optimizer
steps on them. A sample's advantage is measured by the other samples of its prompt, so there is no
value function. A prompt and its samples are one prompt tree: the prompt is computed once. As in PPO
the first step of an iteration does the sampling, and the rollouts are in every checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.losses.group import GroupLoss, grpo_loss, rloo_loss, token_weights
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.scoring import Layout
from pipeline_lib.rl.group_advantage import alike_frac, group_normalized, leave_one_out
from pipeline_lib.rl.kl import Estimator, kl_estimate
from pipeline_lib.rl.rewards import apply_missing_eos
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.collection import RemembersScores, sample_line
from pipeline_lib.training.forward import training_forward
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings
from pipeline_lib.training.guards import require_kl_within, require_start_at_reference
from pipeline_lib.training.iteration_figures import text_figures
from pipeline_lib.training.plan import DataPlan, permutation
from pipeline_lib.training.recipe import Figure, ParameterGroup, RecipeState, StepLoss
from pipeline_lib.training.rollout import gather_rows
from pipeline_lib.training.sampling_rollouts import GroupRollouts, GroupSampler

SAMPLES_KEPT = 3
"""Prompts of each iteration whose first sample is kept for the report."""
RATIO_TOLERANCE_NATS_PER_TOKEN = {torch.float32: 1e-4, torch.float64: 1e-6}
"""How far the ratio may be from 1 before the first update: batches of the update are laid out anew."""
RATIO_TOLERANCE_OF_HALF_PRECISION = 0.05


class GroupRecipe:
    """Trains a policy on groups of its own samples, by RLOO or GRPO as the settings' class says."""

    def __init__(
        self,
        sampler: GroupSampler,
        prompts: Sequence[Tree],
        *,
        settings: RlooSettings | GrpoSettings,
        layout: Layout,
        on_speed: Callable[[int, Mapping[str, float]], None] = lambda *_: None,
    ) -> None:
        """Take what draws and scores samples, the prompts (trees without responses) and the settings.

        Args:
            sampler: Draws and scores samples.
            prompts: Trees without responses.
            settings: Of RLOO or GRPO.
            layout: How rows become forwards.
            on_speed: Told tokens a second with the step; they differ from run to run, so they are no figures.
        """
        self.sampler, self.policy, self.on_speed = sampler, sampler.policy, on_speed
        self.settings, self.layout = settings, layout
        self.plan = DataPlan.of(prompts, settings)
        self.num_steps = settings.iterations * settings.steps_per_iteration
        self.rollouts: GroupRollouts | None = None
        self.iteration_figures: dict[str, float] = {}
        self.samples: list[str] = []
        self._advantage_GK = torch.zeros(0, settings.samples_per_prompt)
        self._update_started_s = 0.0

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the policy's parameters."""
        return [self.policy.group("policy", learning_rate=self.settings.optimizer.learning_rate)]

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Sample where an iteration begins; return the forwards of the step's minibatch."""
        iteration, place = divmod(step, self.settings.steps_per_iteration)
        # A stop between sampling and the update leaves a checkpoint with the new rollouts in it.
        if place == 0 and self.iteration_figures.get("iteration") != iteration:
            started_s = time.monotonic()
            self._take(ProcessGroup().once(lambda: self._collect(iteration)))
            self._tell_speed(step, "rollout_tokens_per_s", since_s=started_s, passes=1)
            self._finish_iteration(iteration)
        if place == 0:
            self._update_started_s = time.monotonic()
        rollouts = self._current()
        epoch, minibatch = divmod(place, self.settings.minibatches)
        order = permutation(len(rollouts.trees), self.settings.seed, "group", iteration, epoch)
        members = order[minibatch :: self.settings.minibatches]
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

    def held_out_loss(self) -> None:
        """Return nothing: the rows are the policy's own samples."""

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

    def after_step(self, step: int) -> dict[str, float]:
        """Return the figures of the iteration that the step belongs to."""
        # A training that was resumed inside an iteration does not know when its update began.
        if (step + 1) % self.settings.steps_per_iteration == 0 and self._update_started_s > 0:
            self._tell_speed(step, "update_tokens_per_s", since_s=self._update_started_s, passes=self.settings.mu)
        return self.iteration_figures

    def _tell_speed(self, step: int, name: str, *, since_s: float, passes: int) -> None:
        elapsed_s = max(time.monotonic() - since_s, 1e-9)
        self.on_speed(step, {name: passes * sum(self._current().lengths_R) / elapsed_s})

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:
        """Check that nothing has moved yet: ratio 1 and, unless the policy starts anew, KL 0.

        Raises:
            DivergedError: The policy is not the one that sampled, or not its reference.
        """
        rollouts = self._current()
        tolerance = RATIO_TOLERANCE_NATS_PER_TOKEN.get(self.policy.model.dtype, RATIO_TOLERANCE_OF_HALF_PRECISION)
        if figures["log_ratio_abs_nats"] > tolerance:
            raise DivergedError(
                f"at step {step} the policy differs from itself by {figures['log_ratio_abs_nats']:.2e} nats a token: "
                "the ratio must be 1 before the first update",
                next_step="report this as a bug: sampled and trained log-probabilities are not of one network",
            )
        if self.policy.starts_as_reference:
            require_start_at_reference(rollouts.logp_N, rollouts.ref_logp_N, step=step)

    def state(self) -> RecipeState:
        """Return rollouts, the iteration's figures, the kept samples and what the scorer remembers."""
        tensors = self.rollouts.tensors() if self.rollouts is not None else {}
        values: dict[str, float | int | str | bool | list[int] | list[str]] = {
            "samples": self.samples,
            "iteration_figures": json.dumps(self.iteration_figures),
        }
        if isinstance(self.sampler.scorer, RemembersScores):
            values["scorer"] = self.sampler.scorer.state()
        return RecipeState(tensors, values)

    def load_state(self, state: RecipeState) -> None:
        """Take a checkpoint's state back."""
        if state.tensors:
            self._take(GroupRollouts.from_tensors(state.tensors))
        kept = state.values["samples"]
        assert isinstance(kept, list)
        self.samples = [str(row) for row in kept]
        self.iteration_figures = json.loads(str(state.values["iteration_figures"]))
        if isinstance(self.sampler.scorer, RemembersScores):
            self.sampler.scorer.load_state(str(state.values["scorer"]))

    def rewards(self, rollouts: GroupRollouts) -> Tensor:
        """Return what the advantages are made of, `(G, K)`: scores after the missing-EOS rule, for RLOO less the KL."""
        score_R = self._shaped(rollouts)
        if isinstance(self.settings, RlooSettings):
            score_R = score_R - self.settings.beta * _kl_R(rollouts)
        return rollouts.groups(score_R)

    def _shaped(self, rollouts: GroupRollouts) -> Tensor:
        return apply_missing_eos(
            rollouts.score_R, rollouts.is_finished_R,
            mode=self.settings.missing_eos, value=self.settings.missing_eos_value,
        )  # fmt: skip

    def _take(self, rollouts: GroupRollouts) -> None:
        """Make rollouts the present ones; their advantages are a function of them."""
        self.rollouts = rollouts
        reward_GK = self.rewards(rollouts)
        if isinstance(self.settings, RlooSettings):
            self._advantage_GK = leave_one_out(reward_GK)
        else:
            self._advantage_GK = group_normalized(reward_GK, scale=self.settings.scale)

    def _current(self) -> GroupRollouts:
        assert self.rollouts is not None, "an iteration begins with rollouts"
        return self.rollouts

    def _collect(self, iteration: int) -> GroupRollouts:
        seed = derive_seed(self.settings.seed, "rollout", iteration)
        where = f"iteration {iteration + 1}/{self.settings.iterations}"
        return self.sampler.collect(self.plan.full_batch(iteration), seed=seed, where=where)

    def _finish_iteration(self, iteration: int) -> None:
        """Measure the rollouts, and guard against KL explosion."""
        rollouts = self._current()
        reward_GK = self.rewards(rollouts)
        kl_R = _kl_R(rollouts)
        kl_nats = float(kl_R.mean())
        ids = [response for tree in rollouts.trees for response in tree.response_ids]
        shaped_score = float(self._shaped(rollouts).mean())
        self.iteration_figures = {
            "iteration": float(iteration),
            "ref_kl_nats": kl_nats,
            "ref_kl_k2_nats": _kl_nats(rollouts, "k2"),
            "ref_kl_k3_nats": _kl_nats(rollouts, "k3"),
            "shaped_score": shaped_score,
            "score": float(rollouts.score_R.mean()),
            "score_std": float(rollouts.score_R.std(unbiased=False)),
            "rlhf_reward": shaped_score - self.settings.beta * kl_nats,
            "group_std": float(reward_GK.std(1).mean()),
            "alike_frac": alike_frac(reward_GK),
            "best_in_group": float(rollouts.groups(rollouts.score_R).amax(1).mean()),
            "entropy_nats": float(rollouts.entropy_N.mean()),
            "response_tokens": sum(rollouts.lengths_R) / len(rollouts.lengths_R),
            "finished_frac": float(rollouts.is_finished_R.float().mean()),
            **text_figures(ids, rollouts.score_R),
            **{f"reward/{name}": float(part_R.mean()) for name, part_R in rollouts.parts_R.items()},
        }
        if rollouts.mismatch_nats is not None:
            self.iteration_figures["rollout/mismatch_nats"] = float(rollouts.mismatch_nats)
        self._keep_samples(iteration, rollouts)
        require_kl_within(
            kl_nats, limit_nats=self.settings.max_kl_nats, iteration=iteration,
            next_step="raise beta, or lower optimizer.learning_rate or mu",
        )  # fmt: skip

    def _keep_samples(self, iteration: int, rollouts: GroupRollouts) -> None:
        for tree, scores_K in list(zip(rollouts.trees, rollouts.groups(rollouts.score_R), strict=True))[:SAMPLES_KEPT]:
            self.samples.append(sample_line(self.sampler.chat, tree, iteration=iteration, score=float(scores_K[0])))


def _kl_R(rollouts: GroupRollouts) -> Tensor:
    """Return log pi - log pi_ref of each response, `(R,)`, nats: the k1 estimate of its KL."""
    return torch.stack([row.sum() for row in rollouts.by_response(rollouts.logp_N - rollouts.ref_logp_N)])


def _kl_nats(rollouts: GroupRollouts, estimator: Estimator) -> float:
    """Return the mean KL of a response by an estimator, nats."""
    kl_N = kl_estimate(rollouts.logp_N, rollouts.ref_logp_N, estimator=estimator)
    return float(kl_N.sum()) / len(rollouts.lengths_R)
