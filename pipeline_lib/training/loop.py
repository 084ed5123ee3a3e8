"""The training loop: every objective runs through it, PPO included.

One step: its forwards, gradients normalised by what the whole step counts, guards, clipping,
AdamW, schedule, figures, and a checkpoint where one is due. A stop request ends the loop after the
step with a checkpoint. Every random draw is a function of (seed, step).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from accelerate import Accelerator
from torch import nn

from pipeline_lib.errors import InterruptedRunError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.training.checkpoint import CheckpointStore, read_checkpoint, write_checkpoint
from pipeline_lib.training.guards import (
    require_finite,
    require_finite_weights,
    require_gradient,
    require_responses,
    require_trainable,
)
from pipeline_lib.training.recipe import Figure, Recipe, StopRequestedError
from pipeline_lib.training.settings import OptimizerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopHooks:
    """What the loop tells and asks of the world around it."""

    on_step: Callable[[int, Mapping[str, float]], None]
    """Called with every step's figures."""
    on_progress: Callable[[float, str], None]
    """Called with the share done and a line of text."""
    should_stop: Callable[[], bool]
    """True once the process was asked to end."""


@dataclass
class _Progress:
    """The loop's counters; all of them are in the checkpoint."""

    step: int = 0
    series: list[dict[str, float]] = field(default_factory=list)


def learning_rate_at(step: int, num_steps: int, settings: OptimizerSettings) -> float:
    """Return the factor on the peak learning rate at a step, counted from 0.

    Linear warm-up over `warmup_frac` of the steps, then constant, linear to 0, or cosine to
    `final_frac`.
    """
    warmup = math.ceil(settings.warmup_frac * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    done_frac = (step - warmup) / max(1, num_steps - warmup)
    if settings.schedule == "linear":
        return 1.0 - done_frac
    cosine = 0.5 * (1 + math.cos(math.pi * done_frac))
    return settings.final_frac + (1 - settings.final_frac) * cosine


class TrainingLoop:
    """Trains a recipe from its newest valid checkpoint to its last step."""

    def __init__(
        self,
        recipe: Recipe,
        settings: OptimizerSettings,
        *,
        seed: int,
        workdir: Path,
        checkpoints: CheckpointStore,
        checkpoint_every_s: float,
        hooks: LoopHooks,
    ) -> None:
        """Take the recipe and everything around it.

        Args:
            recipe: What is trained.
            settings: AdamW and its schedule; groups carry their own peak learning rate.
            seed: Seed from which every step's randomness is derived.
            workdir: Directory for checkpoint files before they are committed.
            checkpoints: Where they are committed.
            checkpoint_every_s: Seconds between checkpoints, at most.
            hooks: Figures and progress out, stop requests in.
        """
        self.recipe, self.settings, self.seed = recipe, settings, seed
        self.workdir, self.checkpoints, self.hooks = workdir, checkpoints, hooks
        self.checkpoint_every_s = checkpoint_every_s
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.groups = list(recipe.parameter_groups())
        require_trainable(self.groups)
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "lr": g.learning_rate} for g in self.groups],
            betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay,
            fused=True,
        )  # fmt: skip
        self.progress = _Progress()

    def run(self) -> list[dict[str, float]]:
        """Train to the last step.

        Returns:
            Every step's figures, `step` among them, from the first step on (resumed ones too).

        Raises:
            DivergedError: A guard stopped the training.
            InterruptedRunError: A stop was requested; a checkpoint is committed.
        """
        self._resume()
        started = last_checkpoint = time.monotonic()
        while self.progress.step < self.recipe.num_steps:
            try:
                figures = self._step(self.progress.step)
            except StopRequestedError:
                self._stop()
            self.progress.series.append({"step": self.progress.step, **figures})
            self.progress.step += 1
            self.hooks.on_step(self.progress.step - 1, figures)
            self.hooks.on_progress(
                self.progress.step / self.recipe.num_steps,
                f"step {self.progress.step}/{self.recipe.num_steps}, loss {figures['loss']:.4f}",
            )
            is_last = self.progress.step == self.recipe.num_steps
            if not is_last and time.monotonic() - last_checkpoint >= self.checkpoint_every_s:
                self._checkpoint()
                last_checkpoint = time.monotonic()
        assert len(self.progress.series) == self.recipe.num_steps, "the steps run are not the steps planned"
        require_finite_weights(
            (f"{g.name}/{name}", parameter) for g in self.groups for name, parameter in g.parameters.items()
        )
        logger.info("trained %d steps in %.1f s", self.recipe.num_steps, time.monotonic() - started)
        return self.progress.series

    def _step(self, step: int) -> dict[str, float]:
        torch.manual_seed(derive_seed(self.seed, "step", step))
        factor = learning_rate_at(step, self.recipe.num_steps, self.settings)
        for group, slot in zip(self.groups, self.optimizer.param_groups, strict=True):
            slot["lr"] = group.learning_rate * factor
        device = self.accelerator.device
        batches = [batch.to(device) for batch in self.recipe.micro_batches(step)]
        require_responses(batches)
        totals: dict[str, Figure] = {}
        loss_sum = 0.0
        for batch in batches:
            if self.hooks.should_stop():
                raise StopRequestedError
            result = self.recipe.loss(batch, batches)
            loss = float(result.loss.detach())
            require_finite(loss, what="the loss", step=step, batches=[batch])
            loss_sum += loss
            self.accelerator.backward(result.loss)
            for name, figure in result.figures.items():
                before = totals.get(name, Figure(0.0, 0.0))
                totals[name] = Figure(before.total + figure.total, before.count + figure.count)
        figures = {"loss": loss_sum, **{name: figure.mean for name, figure in totals.items()}}
        if step == 0:
            self.recipe.check_start(step, figures)
        for group in self.groups:
            norm = float(nn.utils.clip_grad_norm_(group.parameters.values(), self.settings.max_grad_norm))
            require_finite(norm, what=f"the gradient norm of {group.name}", step=step, batches=batches)
            if step == 0:
                require_gradient(norm, step=step)
            figures[f"grad_norm_{group.name}"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        figures["learning_rate"] = self.groups[0].learning_rate * factor
        figures.update(self.recipe.after_step(step))
        return figures

    def _stop(self) -> NoReturn:
        """Commit the state before the step that was broken off, and end."""
        self.optimizer.zero_grad(set_to_none=True)
        self._checkpoint()
        raise InterruptedRunError(
            f"stopped as asked before step {self.progress.step} of {self.recipe.num_steps}, checkpoint committed",
            next_step="run the same command again: it goes on from this step",
        )

    def _checkpoint(self) -> None:
        step = self.progress.step
        directory = self.workdir / f"checkpoint-{step:08d}"
        write_checkpoint(
            directory, groups=self.groups, optimizer=self.optimizer, recipe_state=self.recipe.state(),
            counters={"step": step, "series": self.progress.series},
        )  # fmt: skip
        self.checkpoints.save(step, directory, {"num_steps": self.recipe.num_steps})

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            return
        step, _ = found
        directory = self.checkpoints.fetch(step, self.workdir / f"resume-{step:08d}")
        state, counters = read_checkpoint(directory, groups=self.groups, optimizer=self.optimizer)
        self.recipe.load_state(state)
        self.progress = _Progress(step=int(counters["step"]), series=list(counters["series"]))
        self.hooks.on_progress(step / self.recipe.num_steps, f"resumed from the checkpoint of step {step}")


def write_series(series: list[dict[str, Any]], file: TextIO) -> None:
    """Write step figures as JSON lines."""
    for row in series:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def named_trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that have a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
