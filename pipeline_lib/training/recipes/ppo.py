"""PPO (Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022; conventions of methods 2.4, 3).

An iteration samples one response a prompt, scores it, and makes `ppo_epochs * minibatches`
optimizer steps on it. The loop sees only steps; the first step of an iteration does the sampling,
and the rollouts are in every checkpoint. How rollouts come about is `training/collection.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pipeline_lib.losses.policy import clipped_policy_loss, clipped_value_loss
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.scoring import Layout
from pipeline_lib.rl.advantage import gae, whiten
from pipeline_lib.rl.kl import KlController, kl_estimate
from pipeline_lib.rl.monitor import explained_variance
from pipeline_lib.rl.rewards import apply_missing_eos, token_rewards
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.breaker import CircuitBreaker
from pipeline_lib.training.collection import Collector, RemembersScores, ResponseScorer, require_prompts, sample_line
from pipeline_lib.training.critic import Critic, FrozenRewardModel
from pipeline_lib.training.forward import training_forward
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.guards import require_kl_within, require_start_at_reference
from pipeline_lib.training.iteration_figures import iteration_figures
from pipeline_lib.training.plan import DataPlan, permutation
from pipeline_lib.training.pretraining import PretrainingRows, is_pretraining
from pipeline_lib.training.recipe import Figure, ParameterGroup, RecipeState, StepLoss
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import Rollouts, gather_rows
from pipeline_lib.training.settings import PpoSettings
from pipeline_lib.training.trained_model import TrainedModel

SAMPLES_KEPT = 10
"""Rollouts of each iteration whose texts are kept for the report."""
VALUE = "value:"
"""Prefix of the record id of a rollout in a forward of the value function."""
BREAKER = "breaker/"
"""Prefix of the circuit breaker's tensors in a checkpoint."""


class PpoRecipe:
    """Trains a policy and its value function on its own samples."""

    def __init__(
        self,
        policy: TrainedModel,
        reference: Reference,
        critic: Critic,
        prompts: Sequence[Tree],
        *,
        settings: PpoSettings,
        layout: Layout,
        chat: ChatTokenizer,
        should_stop: Callable[[], bool],
        on_text: Callable[[str], None],
        on_speed: Callable[[int, Mapping[str, float]], None] | None = None,
        heldout: FrozenRewardModel | None = None,
        scorer: ResponseScorer | None = None,
        pretraining: PretrainingRows | None = None,
    ) -> None:
        """Take the models, the prompts and the settings.

        Args:
            policy: What is trained.
            reference: What the KL is measured from.
            critic: Reward model and value function.
            prompts: Trees without responses.
            settings: PPO's.
            layout: How trees become forwards.
            chat: The tokenizer.
            should_stop: True once the process was asked to end.
            on_text: Told what is going on.
            on_speed: Told tokens a second with the step; they differ from run to run, so they are no figures.
            heldout: A reward model that only measures.
            scorer: Gives the scores; None: the reward model.
            pretraining: Adds the loss on pretraining text (PPO-ptx).

        Raises:
            DataError: Prompts that nothing can be sampled after.
        """
        self.policy, self.reference, self.critic = policy, reference, critic
        self.settings, self.layout, self.chat, self.pretraining = settings, layout, chat, pretraining
        self.on_text, self.on_speed = on_text, on_speed
        context_tokens = getattr(policy.model.config, "max_position_embeddings", None)
        require_prompts(prompts, context_tokens=context_tokens, max_new_tokens=settings.max_new_tokens)
        self.collector = Collector(
            policy, reference, critic, layout, chat, settings, should_stop, on_text, heldout=heldout, scorer=scorer
        )
        self.breaker = CircuitBreaker(settings.breaker) if settings.breaker is not None else None
        self.plan = DataPlan.of(prompts, settings)
        self.steps_per_iteration = settings.ppo_epochs * settings.minibatches
        self.num_steps = settings.iterations * self.steps_per_iteration
        self.controller = KlController(
            coef=settings.kl_coef, target=settings.kl_target_nats, horizon=settings.kl_horizon_responses,
            kind=settings.kl_controller,
        )  # fmt: skip
        self.rollouts: Rollouts | None = None
        self.iteration_figures: dict[str, float] = {}
        self.samples: list[str] = []
        self._advantages: dict[int, Tensor] = {}
        self._returns: dict[int, Tensor] = {}
        self._explained_variance = 0.0
        self._update_started_s = 0.0

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the policy's and the value function's parameters."""
        rate = self.settings.optimizer.learning_rate
        return [
            self.policy.group("policy", learning_rate=rate),
            self.critic.group(learning_rate=self.settings.value_learning_rate or rate),
        ]

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Sample where an iteration begins; return the forwards of the step's minibatch."""
        iteration, place = divmod(step, self.steps_per_iteration)
        # A stop between sampling and the update leaves a checkpoint with the new rollouts in it.
        while place == 0 and self.iteration_figures.get("iteration") != iteration:
            rollouts = self._timed(step, iteration)
            if self._finish_iteration(iteration, rollouts):
                self.rollouts = rollouts
        if place == 0:
            self._update_started_s = time.monotonic()
        rollouts = self._current()
        epoch, minibatch = divmod(place, self.settings.minibatches)
        order = permutation(len(rollouts.trees), self.settings.seed, "ppo", iteration, epoch)
        members = order[minibatch :: self.settings.minibatches]
        self._estimate_advantages(rollouts, members)
        trees = [rollouts.trees[index] for index in members]
        # Their gradients have nothing in common: apart, activations of one model at a time are in memory.
        valued = [replace(tree, record_id=VALUE + tree.record_id) for tree in trees]
        batches = self.layout.batches(trees) + self.layout.batches(valued)
        # Both gradients in consecutive forwards of one step (Ouyang et al. 2022, appendix C.4).
        return batches if self.pretraining is None else batches + self.layout.batches(self.pretraining.rows(step))

    @contextmanager
    def training_forward(self, batch: TreeBatch) -> Iterator[None]:
        """Give the context of a forward that is trained on, and its backward: of the policy or the value function."""
        is_checkpointed = self.settings.gradient_checkpointing
        if not is_valued(batch):
            with training_forward([self.policy.model], batch, gradient_checkpointing=is_checkpointed):
                yield
            return
        with self.critic.valuing() as model, training_forward([model], batch, gradient_checkpointing=is_checkpointed):
            yield

    def held_out_loss(self) -> None:
        """Return nothing: PPO's rows are its own samples."""

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the clipped policy loss or the weighted clipped value loss, token means over the step.

        Pretraining text has a token mean of its own.
        """
        kind = _kind(batch)
        num_tokens = sum(member.num_counted for member in step_batches if _kind(member) is kind)
        return kind(self, batch, num_tokens)

    def _policy_loss(self, batch: TreeBatch, num_tokens: int) -> StepLoss:
        rollouts, members, settings = self._current(), _members(batch), self.settings
        device = batch.label_N.device
        old_logp_N = gather_rows(rollouts.rows(rollouts.logp_N), members).to(device)
        advantage_N = torch.cat([self._advantages[index] for index in members]).to(device)
        new = token_logps(self.policy.model, batch, temperature=settings.temperature)
        counts_N = torch.ones_like(old_logp_N, dtype=torch.bool)
        policy = clipped_policy_loss(
            new.token_logp_N, old_logp_N, advantage_N, counts_N, clip_range=settings.clip_range
        )
        count = batch.num_counted
        figures = {
            "policy_loss": Figure(float(policy.loss_sum.detach()), count),
            "clip_frac": Figure(float(policy.num_clipped), count),
            "approx_kl_nats": Figure(float(policy.approx_kl_sum), count),
            "policy_kl_nats": Figure(float(policy.policy_kl_sum), count),
        }
        return StepLoss(policy.loss_sum / num_tokens, figures)

    def _value_loss(self, batch: TreeBatch, num_tokens: int) -> StepLoss:
        rollouts, members, settings = self._current(), _members(batch), self.settings
        device = batch.label_N.device
        old_value_N = gather_rows(rollouts.rows(rollouts.value_N), members).to(device)
        return_N = torch.cat([self._returns[index] for index in members]).to(device)
        counts_N = torch.ones_like(old_value_N, dtype=torch.bool)
        value = clipped_value_loss(
            self.critic.values(batch), old_value_N, return_N, counts_N, value_clip_range=settings.value_clip_range
        )
        count = batch.num_counted
        figures = {
            "value_loss": Figure(float(value.loss_sum.detach()), count),
            "value_clip_frac": Figure(float(value.num_clipped), count),
        }
        return StepLoss(settings.value_coef * value.loss_sum / num_tokens, figures)

    def _pretraining_loss(self, batch: TreeBatch, num_tokens: int) -> StepLoss:
        assert self.pretraining is not None, "pretraining text without its settings"
        nll = -token_logps(self.policy.model, batch).token_logp_N.sum()
        figure = Figure(float(nll.detach()), batch.num_counted)
        return StepLoss(self.pretraining.coef * nll / num_tokens, {"pretraining_nll_per_token_nats": figure})

    def after_step(self, step: int) -> dict[str, float]:
        """Return the figures of the iteration that the step belongs to, and of its minibatch as a whole."""
        # A training that was resumed inside an iteration does not know when its update began.
        is_last = (step + 1) % self.steps_per_iteration == 0
        if is_last and self.on_speed is not None and self._update_started_s > 0:
            tokens = sum(self._current().lengths_R) * self.settings.ppo_epochs
            elapsed_s = time.monotonic() - self._update_started_s
            self.on_speed(step, {"update_tokens_per_s": tokens / max(elapsed_s, 1e-9)})
        return {**self.iteration_figures, "explained_variance_frac": self._explained_variance}

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """Check that the policy starts as its reference, unless what was put in front of it is new.

        Raises:
            DivergedError: The KL of the first rollouts is not 0.
        """
        if not self.policy.starts_as_reference:
            return
        rollouts = self._current()
        require_start_at_reference(rollouts.logp_N, rollouts.ref_logp_N, step=step)

    def state(self) -> RecipeState:
        """Return rollouts, the KL weight, the kept samples and the circuit breaker's state."""
        tensors = self.rollouts.tensors() if self.rollouts is not None else {}
        values: dict[str, float | int | str | bool | list[int] | list[str]] = {
            "kl_coef": self.controller.coef,
            "samples": self.samples,
            "iteration_figures": json.dumps(self.iteration_figures),
        }
        if isinstance(self.collector.scorer, RemembersScores):
            values["scorer"] = self.collector.scorer.state()
        if self.breaker is not None:
            tensors |= {BREAKER + name: value for name, value in self.breaker.tensors().items()}
            values["breaker"] = self.breaker.values()
        return RecipeState(tensors, values)

    def load_state(self, state: RecipeState) -> None:
        """Take a checkpoint's state back."""
        rollouts = {name: value for name, value in state.tensors.items() if not name.startswith(BREAKER)}
        self.rollouts = Rollouts.from_tensors(rollouts) if rollouts else None
        self.controller = self.controller.with_coef(float(str(state.values["kl_coef"])))
        kept = state.values["samples"]
        assert isinstance(kept, list)
        self.samples = [str(row) for row in kept]
        self.iteration_figures = json.loads(str(state.values["iteration_figures"]))
        if isinstance(self.collector.scorer, RemembersScores):
            self.collector.scorer.load_state(str(state.values["scorer"]))
        if self.breaker is not None:
            held = {name.removeprefix(BREAKER): value for name, value in state.tensors.items() if name not in rollouts}
            self.breaker.load(held, str(state.values["breaker"]))

    def _current(self) -> Rollouts:
        assert self.rollouts is not None, "an iteration begins with rollouts"
        return self.rollouts

    def _collect(self, iteration: int) -> Rollouts:
        return self.collector.collect(self.plan.full_batch(iteration), iteration)

    def _timed(self, step: int, iteration: int) -> Rollouts:
        """Collect, and tell how fast."""
        started_s = time.monotonic()
        rollouts = ProcessGroup().once(lambda: self._collect(iteration))
        if self.on_speed is not None:
            elapsed_s = time.monotonic() - started_s
            self.on_speed(step, {"rollout_tokens_per_s": sum(rollouts.lengths_R) / max(elapsed_s, 1e-9)})
        return rollouts

    def _estimate_advantages(self, rollouts: Rollouts, members: list[int]) -> None:
        """Shape the rewards of a minibatch and estimate its advantages and returns."""
        settings = self.settings
        is_unbiased = settings.whiten_variance == "unbiased"
        mask_BT = rollouts.mask(members)
        score_B = apply_missing_eos(
            rollouts.score_R[members], rollouts.is_finished_R[members],
            mode=settings.missing_eos, value=settings.missing_eos_value,
        )  # fmt: skip
        kl_BT = self._kl(rollouts, members)
        reward_BT = token_rewards(kl_BT, score_B, mask_BT, kl_coef=self.iteration_figures["kl_coef"])
        if settings.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift_mean=False, unbiased=is_unbiased)
        value_BT = rollouts.padded(rollouts.value_N, members)
        advantage_BT, return_BT = gae(
            reward_BT, value_BT, mask_BT, gamma=settings.gamma, gae_lambda=settings.gae_lambda
        )
        if settings.whiten_advantages:
            advantage_BT = whiten(advantage_BT, mask_BT, shift_mean=True, unbiased=is_unbiased)
        self._explained_variance = explained_variance(value_BT[mask_BT], return_BT[mask_BT])
        for row, index in enumerate(members):
            self._advantages[index] = advantage_BT[row][mask_BT[row]]
            self._returns[index] = return_BT[row][mask_BT[row]]

    def _kl(self, rollouts: Rollouts, members: list[int]) -> Tensor:
        """Return the KL from the reference of each token as the settings estimate it, padded."""
        if self.settings.kl_estimator == "full":
            assert rollouts.full_kl_N is not None, "rollouts are measured with it"
            return rollouts.padded(rollouts.full_kl_N, members)
        return kl_estimate(
            rollouts.padded(rollouts.logp_N, members), rollouts.padded(rollouts.ref_logp_N, members),
            estimator=self.settings.kl_estimator,
        )  # fmt: skip

    def _finish_iteration(self, iteration: int, rollouts: Rollouts) -> bool:
        """Measure the rollouts, guard against what they show, and set the KL weight for the next.

        Returns:
            False where the circuit breaker went back: these rollouts are then of no use.
        """
        figures = iteration_figures(iteration, rollouts, self.settings, kl_coef=self.controller.coef)
        if self.breaker is not None:
            breach = self.breaker.breach(figures)
            if breach is not None:
                self.breaker.trip(iteration, breach)
                self.on_text(f"iteration {iteration + 1}: {breach}; back to before iteration "
                             f"{self.breaker.good_iteration + 1}, at half the learning rate")  # fmt: skip
                return False
            self.breaker.keep(iteration, figures)
            figures["breaches"] = float(len(self.breaker.breaches))
        kl_nats = figures["ref_kl_nats"]
        self.iteration_figures = figures
        self._keep_samples(iteration, rollouts)
        require_kl_within(
            kl_nats, limit_nats=self.settings.max_kl_nats, iteration=iteration,
            next_step="raise kl_coef, or lower optimizer.learning_rate or ppo_epochs",
        )  # fmt: skip
        self.controller = self.controller.update(kl_nats, num_steps=len(rollouts.trees))
        return True

    def _keep_samples(self, iteration: int, rollouts: Rollouts) -> None:
        for tree, score in list(zip(rollouts.trees, rollouts.score_R.tolist(), strict=True))[:SAMPLES_KEPT]:
            self.samples.append(sample_line(self.chat, tree, iteration=iteration, score=score))


def is_valued(batch: TreeBatch) -> bool:
    """Tell whether a forward is one of the value function; its trees are then all of that kind."""
    return batch.trees[0].record_id.startswith(VALUE)


def _kind(batch: TreeBatch) -> Callable[[PpoRecipe, TreeBatch, int], StepLoss]:
    """Return the loss that a forward is made for."""
    if is_pretraining(batch):
        return PpoRecipe._pretraining_loss
    return PpoRecipe._value_loss if is_valued(batch) else PpoRecipe._policy_loss


def _members(batch: TreeBatch) -> list[int]:
    """Return the places of a forward's rollouts among those of the iteration."""
    return [int(tree.record_id.removeprefix(VALUE)) for tree in batch.trees]
