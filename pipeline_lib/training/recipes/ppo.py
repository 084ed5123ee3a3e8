"""PPO (Schulman et al. 2017, Ziegler et al. 2019, Ouyang et al. 2022; conventions of methods 2.4, 3).

An iteration samples one response a prompt, scores it, and makes `ppo_epochs * minibatches`
optimizer steps on it. The loop sees only steps; the first step of an iteration does the sampling,
and the rollouts are in every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.losses.policy import clipped_policy_loss, clipped_value_loss
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import Layout
from pipeline_lib.rl.advantage import gae, whiten
from pipeline_lib.rl.kl import KlController, kl_estimate
from pipeline_lib.rl.rewards import apply_missing_eos, token_rewards
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.critic import Critic
from pipeline_lib.training.forward import training_forward
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.plan import DataPlan, permutation
from pipeline_lib.training.recipe import Figure, ParameterGroup, RecipeState, StepLoss, StopRequestedError
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import Rollouts, rollout_tree
from pipeline_lib.training.settings import PpoSettings
from pipeline_lib.training.trained_model import TrainedModel

SAMPLES_KEPT = 3
"""Rollouts of each iteration whose texts are kept for the report."""
START_TOLERANCE_NATS_PER_TOKEN = 1e-5
"""How far the KL may be from 0 before the first update."""


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
    ) -> None:
        """Take the models, the prompts (trees without responses) and the settings."""
        self.policy, self.reference, self.critic = policy, reference, critic
        self.settings, self.layout, self.chat = settings, layout, chat
        self.should_stop, self.on_text = should_stop, on_text
        self.plan = DataPlan.of(prompts, settings)
        self.steps_per_iteration = settings.ppo_epochs * settings.minibatches
        self.num_steps = settings.iterations * self.steps_per_iteration
        self.controller = KlController(
            coef=settings.kl_coef, target=settings.kl_target_nats, horizon=settings.kl_horizon_responses
        )
        self.rollouts: Rollouts | None = None
        self.iteration_figures: dict[str, float] = {}
        self.samples: list[str] = []
        self._advantages: dict[int, Tensor] = {}
        self._returns: dict[int, Tensor] = {}

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
        if place == 0 and self.iteration_figures.get("iteration") != iteration:
            self.rollouts = self._collect_once(iteration)
            self._finish_iteration(iteration, self.rollouts)
        rollouts = self._current()
        epoch, minibatch = divmod(place, self.settings.minibatches)
        order = permutation(len(rollouts.trees), self.settings.seed, "ppo", iteration, epoch)
        members = order[minibatch :: self.settings.minibatches]
        self._estimate_advantages(rollouts, members)
        return self.layout.batches([rollouts.trees[index] for index in members])

    def training_forward(self, batch: TreeBatch) -> AbstractContextManager[None]:
        """Return the context of a forward that is trained on: of policy and value function."""
        models = [self.policy.model, self.critic.value.model]
        return training_forward(models, batch, gradient_checkpointing=self.settings.gradient_checkpointing)

    def held_out_loss(self) -> None:
        """Return nothing: PPO's rows are its own samples."""

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        """Return the clipped policy loss plus the weighted clipped value loss, token means."""
        rollouts, settings = self._current(), self.settings
        members = [int(tree.record_id) for tree in batch.trees]
        num_tokens = sum(member.num_counted for member in step_batches)
        device = batch.label_N.device
        old_logp_N = _gather(rollouts.rows(rollouts.logp_N), members).to(device)
        old_value_N = _gather(rollouts.rows(rollouts.value_N), members).to(device)
        advantage_N = torch.cat([self._advantages[index] for index in members]).to(device)
        return_N = torch.cat([self._returns[index] for index in members]).to(device)
        new = token_logps(self.policy.model, batch, temperature=settings.temperature)
        counts_N = torch.ones_like(old_logp_N, dtype=torch.bool)
        policy = clipped_policy_loss(
            new.token_logp_N, old_logp_N, advantage_N, counts_N, clip_range=settings.clip_range
        )
        new_value_N = self.critic.values(batch)
        value = clipped_value_loss(
            new_value_N, old_value_N, return_N, counts_N, value_clip_range=settings.value_clip_range
        )
        loss = (policy.loss_sum + settings.value_coef * value.loss_sum) / num_tokens
        count = batch.num_counted
        figures = {
            "policy_loss": Figure(float(policy.loss_sum.detach()), count),
            "value_loss": Figure(float(value.loss_sum.detach()), count),
            "clip_frac": Figure(float(policy.num_clipped), count),
            "value_clip_frac": Figure(float(value.num_clipped), count),
            "approx_kl_nats": Figure(float(policy.approx_kl_sum), count),
            "policy_kl_nats": Figure(float(policy.policy_kl_sum), count),
        }
        return StepLoss(loss, figures)

    def after_step(self, step: int) -> dict[str, float]:  # noqa: ARG002
        """Return the figures of the iteration that the step belongs to."""
        return self.iteration_figures

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """Check that the policy starts as its reference, unless what was put in front of it is new.

        Raises:
            DivergedError: The KL of the first rollouts is not 0.
        """
        if not self.policy.starts_as_reference:
            return
        rollouts = self._current()
        apart = float((rollouts.logp_N - rollouts.ref_logp_N).abs().mean())
        if apart > START_TOLERANCE_NATS_PER_TOKEN:
            raise DivergedError(
                f"at step {step} policy and reference differ by {apart:.2e} nats a token; they must be one model",
                next_step="the reference must be the model that the policy starts from: report this as a bug",
            )

    def state(self) -> RecipeState:
        """Return rollouts, the KL weight and the kept samples."""
        tensors = self.rollouts.tensors() if self.rollouts is not None else {}
        return RecipeState(
            tensors,
            {
                "kl_coef": self.controller.coef,
                "samples": self.samples,
                "iteration_figures": json.dumps(self.iteration_figures),
            },
        )

    def load_state(self, state: RecipeState) -> None:
        """Take a checkpoint's state back."""
        self.rollouts = Rollouts.from_tensors(state.tensors) if state.tensors else None
        self.controller = self.controller.with_coef(float(str(state.values["kl_coef"])))
        kept = state.values["samples"]
        assert isinstance(kept, list)
        self.samples = [str(row) for row in kept]
        self.iteration_figures = json.loads(str(state.values["iteration_figures"]))

    def _current(self) -> Rollouts:
        assert self.rollouts is not None, "an iteration begins with rollouts"
        return self.rollouts

    def _collect_once(self, iteration: int) -> Rollouts:
        """Sample in the first process and hand the same rollouts to all."""
        group = ProcessGroup()
        rollouts = self._collect(iteration) if group.is_first else None
        shared = group.from_first(rollouts)
        assert shared is not None
        return shared

    def _collect(self, iteration: int) -> Rollouts:
        prompts = self.plan.full_batch(iteration)

        def on_batch(done: int) -> None:
            self.on_text(f"iteration {iteration + 1}/{self.settings.iterations}: sampled {done}/{len(prompts)}")
            if self.should_stop():
                raise StopRequestedError

        samples = sample(
            self.policy.model, [tree.prompt_ids for tree in prompts],
            SamplingSettings(max_new_tokens=self.settings.max_new_tokens, temperature=self.settings.temperature),
            eos_id=self.chat.eos_id, pad_id=self.chat.pad_id,
            seed=derive_seed(self.settings.seed, "rollout", iteration), on_batch=on_batch,
        )  # fmt: skip
        trees = [
            rollout_tree(index, list(tree.prompt_ids), list(drawn.ids))
            for index, (tree, drawn) in enumerate(zip(prompts, samples, strict=True))
        ]
        self.on_text(f"iteration {iteration + 1}/{self.settings.iterations}: scoring {len(trees)} responses")
        scored = self._score(trees)
        is_finished_R = torch.tensor([drawn.is_finished for drawn in samples])
        return Rollouts(tuple(trees), **scored, is_finished_R=is_finished_R)

    @torch.no_grad()
    def _score(self, trees: list[Tree]) -> dict[str, Tensor]:
        """Compute log-probabilities, values and scores of all rollouts, in rollout order."""
        by_index: dict[int, dict[str, Tensor]] = {}
        for batch in self.layout.batches(trees):
            if self.should_stop():
                raise StopRequestedError
            moved = batch.to(self.policy.model.device)
            temperature = self.settings.temperature
            own = token_logps(self.policy.model, moved, temperature=temperature, with_entropy=True)
            assert own.entropy_N is not None
            with self.reference.active() as reference_model:
                ref = token_logps(reference_model, moved, temperature=temperature)
            flat = {
                "logp_N": own.token_logp_N, "ref_logp_N": ref.token_logp_N,
                "entropy_N": own.entropy_N, "value_N": self.critic.values(moved),
            }  # fmt: skip
            score_R = self.critic.scores(moved)
            lengths = batch.lengths_R.tolist()
            rows = {name: values.float().cpu().split(lengths) for name, values in flat.items()}
            for place, tree in enumerate(batch.trees):
                by_index[int(tree.record_id)] = {
                    **{name: row[place] for name, row in rows.items()}, "score_R": score_R[place : place + 1].cpu(),
                }  # fmt: skip
        names = ("logp_N", "ref_logp_N", "entropy_N", "value_N", "score_R")
        return {name: torch.cat([by_index[index][name] for index in range(len(trees))]) for name in names}

    def _estimate_advantages(self, rollouts: Rollouts, members: list[int]) -> None:
        """Shape the rewards of a minibatch and estimate its advantages and returns."""
        settings = self.settings
        mask_BT = rollouts.mask(members)
        score_B = apply_missing_eos(
            rollouts.score_R[members], rollouts.is_finished_R[members],
            mode=settings.missing_eos, value=settings.missing_eos_value,
        )  # fmt: skip
        kl_BT = kl_estimate(
            rollouts.padded(rollouts.logp_N, members), rollouts.padded(rollouts.ref_logp_N, members),
            estimator=settings.kl_estimator,
        )  # fmt: skip
        reward_BT = token_rewards(kl_BT, score_B, mask_BT, kl_coef=self.iteration_figures["kl_coef"])
        if settings.whiten_rewards:
            reward_BT = whiten(reward_BT, mask_BT, shift_mean=False)
        value_BT = rollouts.padded(rollouts.value_N, members)
        advantage_BT, return_BT = gae(
            reward_BT, value_BT, mask_BT, gamma=settings.gamma, gae_lambda=settings.gae_lambda
        )
        if settings.whiten_advantages:
            advantage_BT = whiten(advantage_BT, mask_BT, shift_mean=True)
        for row, index in enumerate(members):
            self._advantages[index] = advantage_BT[row][mask_BT[row]]
            self._returns[index] = return_BT[row][mask_BT[row]]

    def _finish_iteration(self, iteration: int, rollouts: Rollouts) -> None:
        """Measure the rollouts, guard against KL explosion, and set the KL weight for the next."""
        num = len(rollouts.trees)
        k1_R = torch.stack([row.sum() for row in rollouts.rows(rollouts.logp_N - rollouts.ref_logp_N)])
        kl_nats = float(k1_R.mean())
        coef = self.controller.coef
        score = float(rollouts.score_R.mean())
        self.iteration_figures = {
            "iteration": float(iteration),
            "kl_coef": coef,
            "ref_kl_nats": kl_nats,
            "score": score,
            "score_std": float(rollouts.score_R.std(unbiased=False)),
            "non_score_reward": -coef * kl_nats,
            "rlhf_reward": score - coef * kl_nats,
            "entropy_nats": float(rollouts.entropy_N.mean()),
            "response_tokens": sum(rollouts.lengths_R) / num,
            "finished_frac": float(rollouts.is_finished_R.float().mean()),
        }
        self._keep_samples(iteration, rollouts)
        if kl_nats > self.settings.max_kl_nats:
            raise DivergedError(
                f"KL explosion in iteration {iteration + 1}: {kl_nats:.1f} nats a response from the reference, "
                f"the limit is {self.settings.max_kl_nats:.1f}",
                next_step="raise kl_coef, or lower optimizer.learning_rate or ppo_epochs",
            )
        self.controller = self.controller.update(kl_nats, num_steps=num)

    def _keep_samples(self, iteration: int, rollouts: Rollouts) -> None:
        for tree, score in list(zip(rollouts.trees, rollouts.score_R.tolist(), strict=True))[:SAMPLES_KEPT]:
            row = {
                "iteration": iteration,
                "prompt": self.chat.decode(list(tree.prompt_ids)),
                "response": self.chat.decode(list(tree.response_ids[0])),
                "score": score,
            }
            self.samples.append(json.dumps(row, ensure_ascii=False, sort_keys=True))


def _gather(rows: list[Tensor], members: list[int]) -> Tensor:
    return torch.cat([rows[index] for index in members])
