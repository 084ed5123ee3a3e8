"""A checkpoint as files: weights, optimizer, recipe state, counters. Safetensors and JSON only.

Random numbers need no place in it: every draw is a function of (seed, step), see
`hashing.derive_seed`, so a resumed step draws what it would have drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline_lib.errors import ResumeMismatchError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.training.recipe import ParameterGroup, RecipeState


class CheckpointStore(Protocol):
    """Where checkpoints are committed, and found again when valid."""

    def save(self, step: int, directory: Path, note: Mapping[str, Any]) -> None:
        """Commit the files of a directory as the checkpoint of a step."""

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and note of the newest valid checkpoint."""

    def fetch(self, step: int, directory: Path) -> Path:
        """Write a checkpoint's verified files into a directory."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds besides weights and optimizer."""

    counters: dict[str, Any]
    """The loop's step and series."""
    recipe: RecipeState
    averages: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the weights, by parameter; empty without one."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The best weights on held-out rows so far; empty without early stopping, or before its first measurement."""
    stopping: dict[str, float | int] = field(default_factory=dict)
    """Early stopping's counters."""


Laying = Callable[[str, Tensor], Tensor]
"""Lays a tensor out anew: from one process's part to the whole, or back; by the parameter's `<group>/<name>`."""


def collect_tensors(
    groups: list[ParameterGroup], optimizer: torch.optim.Optimizer, state: Checkpoint, *, whole: Laying
) -> dict[str, dict[str, Tensor]]:
    """Copy every tensor of a checkpoint to the CPU, by the name of its file; all processes take part.

    Args:
        groups: What the optimizer holds.
        optimizer: Its moments go with their parameter, `<group>/<name>#<moment>`.
        state: Everything else.
        whole: Makes of what this process holds of a tensor the whole one.
    """
    held: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
    for group in groups:
        for name, parameter in group.parameters.items():
            held["weights"][f"{group.name}/{name}"] = parameter.detach()
            for slot, value in optimizer.state.get(parameter, {}).items():
                held["optimizer"][f"{group.name}/{name}#{slot}"] = torch.as_tensor(value)
    held |= {"averages": state.averages, "best": state.best}
    laid_out = {
        file: {key: _stored(whole(key.partition("#")[0], value)) for key, value in tensors.items()}
        for file, tensors in held.items()
    }
    return {**laid_out, "recipe": {key: _stored(value) for key, value in state.recipe.tensors.items()}}


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def write_checkpoint(directory: Path, tensors: Mapping[str, dict[str, Tensor]], state: Checkpoint) -> None:
    """Write everything that the next step depends on into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, kept in tensors.items():
        save_file(kept, directory / f"{name}.safetensors")
    values = {"counters": state.counters, "recipe": state.recipe.values, "stopping": state.stopping}
    (directory / "state.json").write_bytes(canonical_json(values))


def read_checkpoint(
    directory: Path, *, groups: list[ParameterGroup], optimizer: torch.optim.Optimizer, part: Laying
) -> Checkpoint:
    """Load a checkpoint into parameters and optimizer, and return the rest.

    Args:
        directory: As `write_checkpoint` left it.
        groups: What the optimizer holds.
        optimizer: Gets its moments back.
        part: Makes of a whole tensor what this process holds of it.

    Raises:
        ResumeMismatchError: The checkpoint holds other parameters than the recipe trains, or no
            optimizer state.
    """
    weights = load_file(directory / "weights.safetensors")
    moments = load_file(directory / "optimizer.safetensors")
    expected = {f"{group.name}/{name}" for group in groups for name in group.parameters}
    if expected != set(weights):
        odd = sorted(expected ^ set(weights))[:3]
        raise ResumeMismatchError(
            f"the checkpoint trains other parameters than this configuration: {', '.join(odd)} ...",
            next_step="run with the configuration that the checkpoint was made with",
        )
    with torch.no_grad():
        for group in groups:
            for name, parameter in group.parameters.items():
                key = f"{group.name}/{name}"
                parameter.copy_(part(key, weights[key]))
                slots = {slot.partition("#")[2]: value for slot, value in moments.items() if slot.startswith(f"{key}#")}
                for slot, value in slots.items():
                    # Fused AdamW wants its step counter, too, where the parameter is.
                    optimizer.state[parameter][slot] = part(key, value).to(parameter.device)
    state = json.loads((directory / "state.json").read_bytes())
    without = [group.name for group in groups if not any(name.startswith(f"{group.name}/") for name in moments)]
    if without and state["counters"]["step"] > 0:
        raise ResumeMismatchError(
            f"the checkpoint of step {state['counters']['step']} holds no optimizer state of {', '.join(without)}",
            next_step="delete the checkpoint; the training then starts from the one before it, or anew",
        )
    return Checkpoint(
        counters=dict(state["counters"]),
        recipe=RecipeState(load_file(directory / "recipe.safetensors"), state["recipe"]),
        averages={key: part(key, value) for key, value in load_file(directory / "averages.safetensors").items()},
        best={key: part(key, value) for key, value in load_file(directory / "best.safetensors").items()},
        stopping=dict(state["stopping"]),
    )
