"""Circuit breaker of PPO, RLOO and GRPO: limits on what an iteration's rollouts show, and what happens past them.

A good iteration's weights, moments and averages are kept before it is trained on. The first breach
goes back to them at half the learning rate and samples the iteration anew; the second ends the
training with the weights that had the highest reward, the held-out one where there is one. All of
it is in the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pipeline_lib.errors import DivergedError
from pipeline_lib.training.ema import WeightAverage
from pipeline_lib.training.recipe import ParameterGroup, TrainingEndedError
from pipeline_lib.training.settings import BreakerSettings

RATE_AFTER_BREACH = 0.5
"""Factor on the learning rate once a limit was breached."""
MAX_BREACHES = 2
"""The breach that ends the training."""
_VALUES = (
    "breaches", "good_iteration", "best_iteration", "best_reward", "first_tokens", "best_heldout", "is_at_good",
    "good_is_start", "best_is_start",
)  # fmt: skip


class CircuitBreaker:
    """Keeps the last good and the best state, and decides what a breach means."""

    def __init__(self, settings: BreakerSettings) -> None:
        """Start without any measurement; `bind` gives it what it keeps."""
        self.settings = settings
        self.breaches: list[str] = []
        """What every breach so far was, in words."""
        self.good_iteration = self.best_iteration = -1
        self.best_reward = self.first_tokens = self.best_heldout = 0.0
        self.is_at_good = False
        """True from a return to the last good state to the next measurement."""
        self.good_is_start = self.best_is_start = False
        """True where that state is the one that training started from."""
        self._good: dict[str, Tensor] = {}
        self._best: dict[str, Tensor] = {}
        self._groups: list[ParameterGroup] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._average: WeightAverage | None = None

    def bind(
        self, groups: Sequence[ParameterGroup], optimizer: torch.optim.Optimizer, average: WeightAverage | None
    ) -> None:
        """Take what a good state is made of."""
        self._groups, self._optimizer, self._average = list(groups), optimizer, average

    @property
    def rate_factor(self) -> float:
        """The factor on every learning rate."""
        return RATE_AFTER_BREACH if self.breaches else 1.0

    @property
    def has_ended(self) -> bool:
        """True once a breach ended the training."""
        return len(self.breaches) >= MAX_BREACHES

    def breach(self, figures: Mapping[str, float]) -> str | None:
        """Return which limit an iteration's figures are past, in words; None where they are within all.

        Args:
            figures: Of the iteration: `ref_kl_nats`, `response_tokens`, `entropy_nats`, `finished_frac`,
                `repeated_frac`, `duplicates_frac`, and `heldout_score` where there is a held-out model.
        """
        limits, tokens = self.settings, figures["response_tokens"]
        first = self.first_tokens or tokens
        drift = limits.max_length_drift or 1.0
        held_out = figures.get("heldout_score", 0.0)
        fall = limits.max_heldout_drop if "heldout_score" in figures and self.good_iteration >= 0 else None
        checks: list[tuple[str, float, float | None, float | None]] = [
            ("KL from the reference, nats a response", figures["ref_kl_nats"], limits.min_kl_nats, limits.max_kl_nats),
            (
                f"response length, tokens ({first:.1f} in the first iteration)", tokens,
                first / drift if limits.max_length_drift else None, first * drift if limits.max_length_drift else None,
            ),
            ("entropy, nats a token", figures["entropy_nats"], limits.min_entropy_nats, None),
            ("share of responses that end", figures["finished_frac"], limits.min_finished_frac, None),
            ("share of repeated text", figures["repeated_frac"], None, limits.max_repeated_frac),
            ("share of duplicate responses", figures["duplicates_frac"], None, limits.max_duplicates_frac),
            ("score of the held-out reward model", held_out, None if fall is None else self.best_heldout - fall, None),
        ]  # fmt: skip
        for what, value, least, most in checks:
            if least is not None and value < least:
                return f"{what}: {value:.4g} is below {least:.4g}"
            if most is not None and value > most:
                return f"{what}: {value:.4g} is above {most:.4g}"
        return None

    @torch.no_grad()
    def keep(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Take the state as good, before the iteration is trained on, and as the best where it is.

        Args:
            iteration: Counted from 0.
            figures: As for `breach`, and `rlhf_reward`.
        """
        if self.good_iteration < 0:
            self.first_tokens = figures["response_tokens"]
        held_out = figures.get("heldout_score")
        if held_out is not None:
            self.best_heldout = held_out if self.good_iteration < 0 else max(self.best_heldout, held_out)
        reward = figures["rlhf_reward"] if held_out is None else held_out
        is_start = self.good_iteration < 0 or (self.is_at_good and self.good_is_start)
        self.is_at_good, self.good_is_start = False, is_start
        weights = {f"weights/{key}": parameter.detach().clone() for key, parameter in self._parameters()}
        if self.best_iteration < 0 or reward > self.best_reward:
            self.best_iteration, self.best_reward, self._best = iteration, reward, weights
            self.best_is_start = is_start
        moments = {
            f"moments/{key}#{slot}": torch.as_tensor(value).detach().clone()
            for key, parameter in self._parameters()
            for slot, value in self._state_of(parameter).items()
        }
        averages = self._average.averages if self._average is not None else {}
        kept = {f"averages/{key}": value.clone() for key, value in averages.items()}
        self.good_iteration, self._good = iteration, {**weights, **moments, **kept}

    def trip(self, iteration: int, breach: str) -> None:
        """Go back to the last good state, or end the training.

        Args:
            iteration: Whose rollouts are past a limit, counted from 0.
            breach: What `breach` said.

        Raises:
            DivergedError: There is no good state: the limits exclude the model that training starts from.
            TrainingEndedError: It is the second breach.
        """
        told = f"iteration {iteration + 1}: {breach}"
        if self.good_iteration < 0:
            raise DivergedError(
                f"{told}, before any update: the model that training starts from is past the limit",
                next_step="set this limit of `breaker` so that the starting model is within it, or null",
            )
        self.breaches.append(told)
        if self.has_ended:
            raise TrainingEndedError(
                f"stopped by the circuit breaker, {'; '.join(self.breaches)}; "
                f"the result is the state before iteration {self.best_iteration + 1}"
            )
        self._restore_good()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights in place."""
        for key, parameter in self._parameters():
            parameter.copy_(self._best[f"weights/{key}"])

    @torch.no_grad()
    def _restore_good(self) -> None:
        self.is_at_good = True
        for key, parameter in self._parameters():
            parameter.copy_(self._good[f"weights/{key}"])
            prefix = f"moments/{key}#"
            kept = {name.removeprefix(prefix): value for name, value in self._good.items() if name.startswith(prefix)}
            state = self._state_of(parameter)
            for slot, value in state.items():
                # Before the first step there are none, which is the same as all being 0; an 8-bit
                # optimizer's tables (qmap) are constants.
                if not slot.startswith("qmap"):
                    state[slot] = kept[slot].clone() if kept else torch.zeros_like(torch.as_tensor(value))
        if self._average is not None:
            self._average.load({key: self._good[f"averages/{key}"] for key in self._average.averages})

    def require_gain(self, *, kl_weight: str) -> None:
        """Stop where a breach ended the training and nothing was better than its start.

        Args:
            kl_weight: The setting that weighs the KL.

        Raises:
            DivergedError: With the breaches.
        """
        if self.has_ended and self.best_is_start:
            raise DivergedError(
                f"the circuit breaker ended the training, {'; '.join(self.breaches)}, and no iteration had a higher "
                "reward than the model that it started from",
                next_step=f"raise {kl_weight}, lower optimizer.learning_rate, or widen the limit of `breaker`",
            )

    def facts(self) -> dict[str, object]:
        """Return which limits were breached and which state is the best; empty without a breach."""
        return {"breaches": self.breaches, "best_iteration": self.best_iteration} if self.breaches else {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the kept states, for a checkpoint."""
        return {f"good/{key}": value for key, value in self._good.items()} | {
            f"best/{key}": value for key, value in self._best.items()
        }

    def values(self) -> str:
        """Return the rest as JSON, for a checkpoint."""
        return json.dumps({name: getattr(self, name) for name in _VALUES})

    def load(self, tensors: Mapping[str, Tensor], values: str) -> None:
        """Take a checkpoint's state back."""
        loaded: dict[str, Any] = json.loads(values)
        for name in _VALUES:
            setattr(self, name, loaded[name])
        device = next(parameter.device for _, parameter in self._parameters())
        moved = {key: value.to(device) for key, value in tensors.items()}
        self._good = {key.removeprefix("good/"): value for key, value in moved.items() if key.startswith("good/")}
        self._best = {key.removeprefix("best/"): value for key, value in moved.items() if key.startswith("best/")}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self._groups, "the loop binds the breaker before it trains"
        for group in self._groups:
            for name, parameter in group.parameters.items():
                yield f"{group.name}/{name}", parameter

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        assert self._optimizer is not None
        state: dict[str, Any] = self._optimizer.state.get(parameter, {})
        return state


@runtime_checkable
class Guarded(Protocol):
    """A recipe that may have a circuit breaker."""

    breaker: CircuitBreaker | None
