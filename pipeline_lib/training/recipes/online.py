"""What recipes on the policy's own samples share: when to sample, what is kept of it, what to go back to.

An iteration samples, scores and measures, and makes `passes * minibatches` optimizer steps on what
came. The loop sees only steps: the first step of an iteration does the sampling, and the rollouts are
in every checkpoint, so that a training goes on in the middle of an iteration.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

import torch

from pipeline_lib.errors import DivergedError
from pipeline_lib.models.scoring import Layout
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.breaker import CircuitBreaker
from pipeline_lib.training.collection import RemembersScores, require_prompts, sample_line
from pipeline_lib.training.group import ProcessGroup
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings
from pipeline_lib.training.guards import require_kl_within, require_start_at_reference
from pipeline_lib.training.plan import DataPlan, permutation
from pipeline_lib.training.recipe import RecipeState
from pipeline_lib.training.rollout import Rollouts
from pipeline_lib.training.settings import PpoSettings
from pipeline_lib.training.trained_model import TrainedModel

SAMPLES_KEPT = 10
"""Responses of each iteration whose texts are kept for the report."""
BREAKER = "breaker/"
"""Prefix of the circuit breaker's tensors in a checkpoint."""

RATIO_TOLERANCE_NATS_PER_TOKEN = {torch.float32: 1e-4, torch.float64: 1e-6}
"""How far the ratio may be from 1 before the first update: batches of the update are laid out anew."""
RATIO_TOLERANCE_OF_HALF_PRECISION = 0.05

RolloutsT = TypeVar("RolloutsT", bound=Rollouts)
SettingsT = TypeVar("SettingsT", bound=PpoSettings | RlooSettings | GrpoSettings)
OnSpeed = Callable[[int, Mapping[str, float]], None]
"""Told tokens a second with the step; they differ from run to run, so they are no figures."""


class OwnSamples(ABC, Generic[RolloutsT, SettingsT]):
    """Iterations of sampling and learning; a subclass says how samples come about and what is learnt of them."""

    order_scope: ClassVar[str]
    """Part of what the order of each pass is drawn from."""
    kl_advice: ClassVar[str]
    """What to turn where the KL explodes."""

    def __init__(
        self,
        policy: TrainedModel,
        prompts: Sequence[Tree],
        rollouts_type: type[RolloutsT],
        *,
        settings: SettingsT,
        passes: int,
        layout: Layout,
        chat: ChatTokenizer,
        scorer: object,
        on_text: Callable[[str], None],
        on_speed: OnSpeed,
    ) -> None:
        """Take what every such training has.

        Args:
            policy: What is trained.
            prompts: Trees without responses.
            rollouts_type: What `_collect` returns.
            settings: The method's.
            passes: Passes over an iteration's samples, each in a new order.
            layout: How trees become forwards.
            chat: The tokenizer.
            scorer: What gives the scores; it may remember earlier ones.
            on_text: Told what is going on.
            on_speed: Told tokens a second.

        Raises:
            DataError: Prompts that nothing can be sampled after.
        """
        self.policy, self.settings, self.layout, self.chat = policy, settings, layout, chat
        self.on_text, self.on_speed = on_text, on_speed
        context_tokens = getattr(policy.model.config, "max_position_embeddings", None)
        require_prompts(prompts, context_tokens=context_tokens, max_new_tokens=settings.max_new_tokens)
        self.plan = DataPlan.of(prompts, settings)
        self._row_of_prompt = {tree.prompt_ids: tree.record_id for tree in reversed(prompts)}
        self.passes, self.steps_per_iteration = passes, passes * settings.minibatches
        self.num_steps = settings.iterations * self.steps_per_iteration
        self.breaker = CircuitBreaker(settings.breaker) if settings.breaker is not None else None
        self.rollouts: RolloutsT | None = None
        self.iteration_figures: dict[str, float] = {}
        self.samples: list[str] = []
        self._rollouts_type, self._scorer = rollouts_type, scorer
        self._update_started_s = 0.0

    @abstractmethod
    def _collect(self, iteration: int) -> RolloutsT:
        """Sample, score and measure: a function of (seed, iteration, weights)."""

    @abstractmethod
    def _measure(self, iteration: int, rollouts: RolloutsT) -> dict[str, float]:
        """Return the figures of an iteration's rollouts."""

    @abstractmethod
    def _accept(self, rollouts: RolloutsT) -> None:
        """Take note of rollouts that will be trained on; called once an iteration."""

    def minibatch(self, step: int) -> list[int]:
        """Sample where an iteration begins; return the places of the prompts that a step trains on.

        Raises:
            StopRequestedError: The process was asked to end.
            TrainingEndedError: The circuit breaker ends the training.
            DivergedError: The KL exploded, or the starting model is past a limit.
        """
        iteration, place = divmod(step, self.steps_per_iteration)
        # A stop between sampling and the update leaves a checkpoint with the new rollouts in it.
        while place == 0 and self.iteration_figures.get("iteration") != iteration:
            self._finish_iteration(iteration, self._timed(step, iteration))
        if place == 0:
            self._update_started_s = time.monotonic()
        number, minibatch = divmod(place, self.settings.minibatches)
        order = permutation(len(self._current().trees), self.settings.seed, self.order_scope, iteration, number)
        return order[minibatch :: self.settings.minibatches]

    def row_of(self, tree: Tree) -> str:
        """Return the row that a rollout's prompt comes from; the record id of a rollout is a place."""
        return self._row_of_prompt.get(tree.prompt_ids, tree.record_id)

    def held_out_loss(self) -> None:
        """Return nothing: the rows are the policy's own samples."""

    def after_step(self, step: int) -> dict[str, float]:
        """Return the figures of the iteration that the step belongs to."""
        # A training that was resumed inside an iteration does not know when its update began.
        if (step + 1) % self.steps_per_iteration == 0 and self._update_started_s > 0:
            tokens = self.passes * sum(self._current().lengths_R)
            self._tell_speed(step, "update_tokens_per_s", tokens, since_s=self._update_started_s)
        return self.iteration_figures

    def check_start(self, step: int, figures: Mapping[str, float]) -> None:
        """Check that nothing has moved yet: ratio 1 and, unless what was put in front of the policy is new, KL 0.

        Raises:
            DivergedError: The policy is not the one that sampled, or not its reference.
        """
        tolerance = RATIO_TOLERANCE_NATS_PER_TOKEN.get(self.policy.model.dtype, RATIO_TOLERANCE_OF_HALF_PRECISION)
        if figures["log_ratio_abs_nats"] > tolerance:
            raise DivergedError(
                f"at step {step} the policy differs from itself by {figures['log_ratio_abs_nats']:.2e} nats a token: "
                "the ratio must be 1 before the first update",
                next_step="report this as a bug: sampled and trained log-probabilities are not of one network",
            )
        if self.policy.starts_as_reference:
            rollouts = self._current()
            require_start_at_reference(rollouts.logp_N, rollouts.ref_logp_N, step=step)

    def state(self) -> RecipeState:
        """Return rollouts, the iteration's figures, the kept samples, and what scorer and circuit breaker remember."""
        tensors = self.rollouts.tensors() if self.rollouts is not None else {}
        values: dict[str, float | int | str | bool | list[int] | list[str]] = {
            "samples": self.samples,
            "iteration_figures": json.dumps(self.iteration_figures),
        }
        if isinstance(self._scorer, RemembersScores):
            values["scorer"] = self._scorer.state()
        if self.breaker is not None:
            tensors |= {BREAKER + name: value for name, value in self.breaker.tensors().items()}
            values["breaker"] = self.breaker.values()
        return RecipeState(tensors, values)

    def load_state(self, state: RecipeState) -> None:
        """Take a checkpoint's state back."""
        rollouts = {name: value for name, value in state.tensors.items() if not name.startswith(BREAKER)}
        self.rollouts = self._rollouts_type.from_tensors(rollouts) if rollouts else None
        kept = state.values["samples"]
        assert isinstance(kept, list)
        self.samples = [str(row) for row in kept]
        self.iteration_figures = json.loads(str(state.values["iteration_figures"]))
        if isinstance(self._scorer, RemembersScores):
            self._scorer.load_state(str(state.values["scorer"]))
        if self.breaker is not None:
            held = {name.removeprefix(BREAKER): value for name, value in state.tensors.items() if name not in rollouts}
            self.breaker.load(held, str(state.values["breaker"]))

    def _current(self) -> RolloutsT:
        assert self.rollouts is not None, "an iteration begins with rollouts"
        return self.rollouts

    def _timed(self, step: int, iteration: int) -> RolloutsT:
        """Collect, and tell how fast."""
        started_s = time.monotonic()
        rollouts = ProcessGroup().once(lambda: self._collect(iteration))
        self._tell_speed(step, "rollout_tokens_per_s", sum(rollouts.lengths_R), since_s=started_s)
        return rollouts

    def _tell_speed(self, step: int, name: str, tokens: int, *, since_s: float) -> None:
        self.on_speed(step, {name: tokens / max(time.monotonic() - since_s, 1e-9)})

    def _finish_iteration(self, iteration: int, rollouts: RolloutsT) -> None:
        """Measure rollouts and guard against what they show; where the breaker goes back, they are of no use."""
        figures = self._measure(iteration, rollouts)
        if self.breaker is not None:
            breach = self.breaker.breach(figures)
            if breach is not None:
                self.breaker.trip(iteration, breach)
                self.on_text(f"iteration {iteration + 1}: {breach}; back to before iteration "
                             f"{self.breaker.good_iteration + 1}, at half the learning rate")  # fmt: skip
                return
            self.breaker.keep(iteration, figures)
            figures["breaches"] = float(len(self.breaker.breaches))
        self.rollouts, self.iteration_figures = rollouts, figures
        self._keep_samples(iteration, rollouts)
        require_kl_within(
            figures["ref_kl_nats"], limit_nats=self.settings.max_kl_nats, iteration=iteration, next_step=self.kl_advice
        )
        self._accept(rollouts)

    def _keep_samples(self, iteration: int, rollouts: RolloutsT) -> None:
        """Keep a response of every prompt, then a second one of each, until there are enough."""
        score_GK = rollouts.groups(rollouts.score_R)
        places = [(k, g) for k in range(rollouts.samples_per_prompt) for g in range(len(rollouts.trees))]
        for k, g in places[:SAMPLES_KEPT]:
            score = float(score_GK[g, k])
            self.samples.append(sample_line(self.chat, rollouts.trees[g], place=k, iteration=iteration, score=score))
