"""PPO (Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022).

An iteration samples one response a prompt, scores it, and makes `ppo_epochs * minibatches`
optimizer steps on it. When it samples is `recipes/online.py`, how is `training/collection.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from pipeline_lib.rl.rewards import token_rewards
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.collection import Collector, ResponseScorer
from pipeline_lib.training.critic import Critic, FrozenRewardModel
from pipeline_lib.training.forward import training_forward
from pipeline_lib.training.iteration_figures import iteration_figures, shaped_scores
from pipeline_lib.training.pretraining import PretrainingRows, is_pretraining
from pipeline_lib.training.recipe import Figure, ParameterGroup, RecipeState, StepLoss
from pipeline_lib.training.recipes.online import OnSpeed, OwnSamples
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import ValuedRollouts, gather_rows
from pipeline_lib.training.settings import PpoSettings
from pipeline_lib.training.trained_model import TrainedModel

VALUE = "value:"
"""Prefix of the record id of a rollout in a forward of the value function."""


class PpoRecipe(OwnSamples[ValuedRollouts, PpoSettings]):
    """Trains a policy and its value function on its own samples."""

    order_scope = "ppo"
    kl_advice = "raise kl_coef, or lower optimizer.learning_rate or ppo_epochs"

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
        on_speed: OnSpeed = lambda *_: None,
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
            on_speed: Told tokens a second.
            heldout: A reward model that only measures.
            scorer: Gives the scores; None: the reward model.
            pretraining: Adds the loss on pretraining text (PPO-ptx).

        Raises:
            DataError: Prompts that nothing can be sampled after.
        """
        super().__init__(
            policy, prompts, ValuedRollouts, settings=settings, passes=settings.ppo_epochs, layout=layout, chat=chat,
            scorer=scorer, on_text=on_text, on_speed=on_speed,
        )  # fmt: skip
        self.reference, self.critic, self.pretraining = reference, critic, pretraining
        self.collector = Collector(
            policy, reference, critic, layout, chat, settings, should_stop, on_text, heldout=heldout, scorer=scorer
        )
        self.controller = KlController(
            coef=settings.kl_coef, target=settings.kl_target_nats, horizon=settings.kl_horizon_responses,
            kind=settings.kl_controller,
        )  # fmt: skip
        self._advantages: dict[int, Tensor] = {}
        self._returns: dict[int, Tensor] = {}
        self._explained_variance = 0.0

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Return the policy's and the value function's parameters."""
        rate = self.settings.optimizer.learning_rate
        return [
            self.policy.group("policy", learning_rate=rate),
            self.critic.group(learning_rate=self.settings.value_learning_rate or rate),
        ]

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        """Sample where an iteration begins; return the forwards of the step's minibatch."""
        members = self.minibatch(step)
        rollouts = self._current()
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
            "log_ratio_abs_nats": Figure(float((new.token_logp_N.detach() - old_logp_N).abs().sum()), count),
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
        return {**super().after_step(step), "explained_variance_frac": self._explained_variance}

    def state(self) -> RecipeState:
        """Return what every such training carries, and the KL weight."""
        state = super().state()
        return RecipeState(state.tensors, {**state.values, "kl_coef": self.controller.coef})

    def load_state(self, state: RecipeState) -> None:
        """Take a checkpoint's state back."""
        super().load_state(state)
        self.controller = self.controller.with_coef(float(str(state.values["kl_coef"])))

    def _collect(self, iteration: int) -> ValuedRollouts:
        return self.collector.collect(self.plan.full_batch(iteration), iteration)

    def _measure(self, iteration: int, rollouts: ValuedRollouts) -> dict[str, float]:
        coef = self.controller.coef
        figures = iteration_figures(
            iteration, rollouts, self.settings, kl_coef=coef, kl_estimator=self.settings.kl_estimator
        )
        return {**figures, "kl_coef": coef}

    def _accept(self, rollouts: ValuedRollouts) -> None:
        """Set the KL weight for the next iteration."""
        kl_nats = self.iteration_figures["ref_kl_nats"]
        self.controller = self.controller.update(kl_nats, num_steps=len(rollouts.trees))

    def _estimate_advantages(self, rollouts: ValuedRollouts, members: list[int]) -> None:
        """Shape the rewards of a minibatch and estimate its advantages and returns."""
        settings = self.settings
        is_unbiased = settings.whiten_variance == "unbiased"
        mask_BT = rollouts.mask(members)
        score_B = shaped_scores(rollouts, settings)[members]
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

    def _kl(self, rollouts: ValuedRollouts, members: list[int]) -> Tensor:
        """Return the KL from the reference of each token as the settings estimate it, padded."""
        if self.settings.kl_estimator == "full":
            assert rollouts.full_kl_N is not None, "rollouts are measured with it"
            return rollouts.padded(rollouts.full_kl_N, members)
        return kl_estimate(
            rollouts.padded(rollouts.logp_N, members), rollouts.padded(rollouts.ref_logp_N, members),
            estimator=self.settings.kl_estimator,
        )  # fmt: skip


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
