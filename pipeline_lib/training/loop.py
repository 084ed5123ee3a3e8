"""The training loop: every objective runs through it, PPO included.

One step: its forwards, gradients normalised by what the whole step counts and summed over the
processes, guards, clipping, optimizer, schedule, moving average, figures, and a checkpoint where one
is due. A stop request ends the loop with a checkpoint. Every random draw is a function of (seed, step).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch

from pipeline_lib.errors import InterruptedRunError, ResumeMismatchError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.precision import default_device
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.breaker import Guarded
from pipeline_lib.training.checkpoint import (
    Checkpoint,
    CheckpointStore,
    collect_tensors,
    read_checkpoint,
    write_checkpoint,
)
from pipeline_lib.training.early_stopping import EarlyStopping
from pipeline_lib.training.ema import WeightAverage
from pipeline_lib.training.group import ProcessGroup, add_figures
from pipeline_lib.training.guards import (
    require_finite,
    require_finite_weights,
    require_gradient,
    require_responses,
    require_trainable,
)
from pipeline_lib.training.optimizer import build_optimizer, epsilon_at, learning_rate_at
from pipeline_lib.training.recipe import Figure, NamesRows, Recipe, Scored, StopRequestedError, TrainingEndedError
from pipeline_lib.training.settings import OfflineSettings, TrainingSettings
from pipeline_lib.training.weights import Weights, WholeWeights

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


class TrainingLoop:
    """Trains a recipe from its newest valid checkpoint to its last step."""

    def __init__(
        self,
        recipe: Recipe,
        settings: TrainingSettings,
        *,
        workdir: Path,
        checkpoints: CheckpointStore,
        checkpoint_every_s: float,
        hooks: LoopHooks,
        is_sharded: bool = False,
    ) -> None:
        """Take the recipe and everything around it.

        Args:
            recipe: What is trained.
            settings: Optimizer, schedule, averaging, early stopping, and the seed from which every step's
                randomness is derived; parameter groups carry their own peak learning rate.
            workdir: Directory for checkpoint files before they are committed.
            checkpoints: Where they are committed.
            checkpoint_every_s: Seconds between checkpoints, at most.
            hooks: Figures and progress out, stop requests in.
            is_sharded: Divide every weight among the processes; alone, a process holds all of it.

        Raises:
            ConfigError: Such weights cannot be divided.
        """
        self.recipe, self.settings = recipe, settings
        self.workdir, self.checkpoints, self.hooks = workdir, checkpoints, hooks
        self.checkpoint_every_s = checkpoint_every_s
        self.processes = ProcessGroup()
        self.device = default_device()
        self.weights = _weights_of(recipe, settings, self.processes, is_sharded=is_sharded)
        self.groups = self.weights.groups
        require_trainable(self.groups)
        self.optimizer = build_optimizer(self.groups, settings.optimizer)
        self.average = WeightAverage(self.groups, settings.ema_decay) if settings.ema_decay is not None else None
        stopping = settings.early_stopping if isinstance(settings, OfflineSettings) else None
        self.stopping = EarlyStopping(self.groups, stopping) if stopping is not None else None
        self.breaker = recipe.breaker if isinstance(recipe, Guarded) else None
        if self.breaker is not None:
            self.breaker.bind(self.groups, self.optimizer, self.average)
        self.end: str | None = None
        """Why training ended before its last step, where a recipe ended it."""
        self.progress = _Progress()

    def run(self) -> list[dict[str, float]]:
        """Train to the last step, or until held-out rows no longer gain.

        Returns:
            Every step's figures, `step` among them, from the first step on (resumed ones too).

        Raises:
            DivergedError: A guard stopped the training.
            InterruptedRunError: A stop was requested; a checkpoint is committed.
        """
        self._resume()
        started = last_checkpoint = time.monotonic()
        while self.progress.step < self.recipe.num_steps and not self._has_ended_early:
            try:
                figures = self._step(self.progress.step)
            except StopRequestedError:
                self._stop()
            except TrainingEndedError as ended:
                self.end = str(ended)
                break
            self._measure(self.progress.step, figures)
            self.progress.series.append({"step": self.progress.step, **figures})
            self.progress.step += 1
            self.hooks.on_step(self.progress.step - 1, figures)
            self.hooks.on_progress(
                self.progress.step / self.recipe.num_steps,
                f"step {self.progress.step}/{self.recipe.num_steps}, loss {figures['loss']:.4f}",
            )
            is_last = self.progress.step == self.recipe.num_steps
            is_due = time.monotonic() - last_checkpoint >= self.checkpoint_every_s
            if not is_last and self.processes.from_first(is_due):
                self._checkpoint()
                last_checkpoint = time.monotonic()
        self._finish()
        logger.info("trained %d steps in %.1f s", self.progress.step, time.monotonic() - started)
        return self.progress.series

    @property
    def _has_ended_early(self) -> bool:
        return self.end is not None or (self.stopping is not None and self.stopping.has_ended)

    def _finish(self) -> None:
        """Check that the plan was carried out, and put the weights in place that training ends with."""
        planned = self.progress.step if self._has_ended_early else self.recipe.num_steps
        assert len(self.progress.series) == planned, "the steps run are not the steps planned"
        if self.stopping is not None:
            self.stopping.restore()
            self.hooks.on_progress(1.0, self.stopping.outcome)
        elif self.end is not None:
            assert self.breaker is not None, "only a circuit breaker ends a training"
            self.breaker.restore_best()
            self.hooks.on_progress(1.0, self.end)
        elif self.average is not None:
            self.average.apply()
        self.weights.finish()
        self.groups = self.weights.groups

    def _measure(self, step: int, figures: dict[str, float]) -> None:
        """Measure the held-out rows where that is due; with averaging, on the average."""
        if self.stopping is None or not self.stopping.is_due(step, self.recipe.num_steps):
            return
        with self.average.applied() if self.average is not None else nullcontext():
            loss = self.weights.measure(self.recipe.held_out_loss)
            assert loss is not None, "early stopping needs held-out rows"
            score = self.weights.measure(self.recipe.held_out_score) if isinstance(self.recipe, Scored) else None
        self.stopping.record(step, loss, score=score)
        figures["held_out_loss"] = loss
        if score is not None:
            figures["held_out_score"] = score

    def _step(self, step: int) -> dict[str, float]:
        torch.manual_seed(derive_seed(self.settings.seed, "step", step))
        found = self.weights.measure(partial(self.recipe.micro_batches, step))
        batches = [batch.to(self.device) for batch in found]
        factor = self._set_rates(step)  # after the batches: a circuit breaker may have halved them
        require_responses(batches)
        totals = self._accumulate(step, batches)
        figures = {name: figure.mean for name, figure in totals.items()}
        if step == 0:
            self.recipe.check_start(step, figures)
        for group in self.groups:
            norm = self.weights.clip(group, self.settings.optimizer.max_grad_norm)
            require_finite(norm, what=f"the gradient norm of {group.name}", step=step, rows=self._rows(batches))
            if step == 0:
                require_gradient(norm, step=step)
            figures[f"grad_norm_{group.name}"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        require_finite_weights(self.groups, step=step, rows=self._rows(batches))
        if self.average is not None:
            self.average.update()
        figures["learning_rate"] = self.groups[0].learning_rate * factor
        figures.update(self.recipe.after_step(step))
        return figures

    def _set_rates(self, step: int) -> float:
        """Give the optimizer the step's learning rates; return the factor on their peaks."""
        factor = learning_rate_at(step, self.recipe.num_steps, self.settings.optimizer)
        if self.breaker is not None:
            factor *= self.breaker.rate_factor
        for group, slot in zip(self.groups, self.optimizer.param_groups, strict=True):
            slot["lr"] = group.learning_rate * factor
            if self.settings.optimizer.name == "adamw":
                slot["eps"] = epsilon_at(step, self.settings.optimizer)
        return factor

    def _accumulate(self, step: int, batches: list[TreeBatch]) -> dict[str, Figure]:
        """Sum loss, gradient and figures over a step's forwards, this process's and the others'."""
        is_alone = self.processes.size == 1
        if not is_alone and self.processes.from_first(self.hooks.should_stop()):
            raise StopRequestedError
        totals: dict[str, Figure] = {}
        places = {id(batch): place for place, batch in enumerate(batches)}
        for batch, counts in self.weights.share(batches):
            # Processes may only stop together, so where there are more, between steps alone.
            if is_alone and self.hooks.should_stop():
                raise StopRequestedError
            # What a forward draws (dropout, noise) is its own, whichever process runs it, and after which others.
            torch.manual_seed(derive_seed(self.settings.seed, "step", step, "forward", places[id(batch)]))
            with self.recipe.training_forward(batch):
                result = self.weights.forward(partial(self.recipe.loss, batch, batches))
                loss = float(result.loss.detach())
                require_finite(loss, what="the loss", step=step, rows=self._rows([batch]))
                (result.loss if counts else 0.0 * result.loss).backward()
            if counts:
                add_figures(totals, {"loss": Figure(loss, 0.0), **result.figures})
        self.weights.sum_gradients()
        totals = self.processes.sum_figures(totals)
        return {**totals, "loss": Figure(totals["loss"].total, 1.0)}

    def _rows(self, batches: Sequence[TreeBatch]) -> list[str]:
        """Return the ids of the rows in some forwards, each once."""
        row_of = self.recipe.row_of if isinstance(self.recipe, NamesRows) else attrgetter("record_id")
        return list(dict.fromkeys(row_of(tree) for batch in batches for tree in batch.trees))

    def _stop(self) -> NoReturn:
        """Commit the state before the step that was broken off, and end."""
        self.optimizer.zero_grad(set_to_none=True)
        self._checkpoint()
        raise InterruptedRunError(
            f"stopped as asked before step {self.progress.step} of {self.recipe.num_steps}, checkpoint committed",
            next_step="run the same command again: it goes on from this step",
        )

    def _checkpoint(self) -> None:
        if not (self.processes.is_first or self.weights.is_cut):
            return
        step = self.progress.step
        directory = self.workdir / f"checkpoint-{step:08d}"
        state = Checkpoint(
            counters={"step": step, "series": self.progress.series},
            recipe=self.recipe.state(),
            averages=self.average.averages if self.average is not None else {},
            best=self.stopping.best if self.stopping is not None else {},
            stopping=self.stopping.counters() if self.stopping is not None else {},
        )
        tensors = collect_tensors(self.groups, self.optimizer, state, whole=self.weights.whole)
        if not self.processes.is_first:
            return
        write_checkpoint(directory, tensors, state)
        self.checkpoints.save(step, directory, {"num_steps": self.recipe.num_steps})

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        step = self.processes.from_first(found[0] if found is not None else None)
        if step is None:
            return
        directory = self.checkpoints.fetch(step, self.workdir / f"resume-{step:08d}")
        state = read_checkpoint(directory, groups=self.groups, optimizer=self.optimizer, part=self.weights.part)
        if bool(state.averages) != (self.average is not None) or bool(state.stopping) != (self.stopping is not None):
            raise ResumeMismatchError(
                "the checkpoint was made with another ema_decay or early_stopping",
                next_step="run with the configuration that the checkpoint was made with",
            )
        self.recipe.load_state(state.recipe)
        if self.average is not None:
            self.average.load(state.averages)
        if self.stopping is not None:
            self.stopping.load(state.stopping, state.best)
        self.progress = _Progress(step=int(state.counters["step"]), series=list(state.counters["series"]))
        self.hooks.on_progress(step / self.recipe.num_steps, f"resumed from the checkpoint of step {step}")


def write_series(series: list[dict[str, Any]], file: TextIO) -> None:
    """Write step figures as JSON lines."""
    for row in series:
        file.write(json.dumps(row, sort_keys=True) + "\n")


def _weights_of(recipe: Recipe, settings: TrainingSettings, processes: ProcessGroup, *, is_sharded: bool) -> Weights:
    if not is_sharded or processes.size == 1:
        return WholeWeights(recipe, processes)
    # torch's sharding takes long to import, and few trainings use it.
    from pipeline_lib.training.sharding import ShardedWeights  # noqa: PLC0415

    return ShardedWeights(recipe, processes, settings)
