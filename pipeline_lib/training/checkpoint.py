"""A checkpoint as files: weights, optimizer, recipe state, counters. Safetensors and JSON only.

Random numbers need no place in it: every draw is a function of (seed, step), see
`hashing.derive_seed`, so a resumed step draws what it would have drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def write_checkpoint(
    directory: Path, *, groups: list[ParameterGroup], optimizer: torch.optim.Optimizer, state: Checkpoint
) -> None:
    """Write everything that the next step depends on into a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for group in groups:
        for name, parameter in group.parameters.items():
            weights[f"{group.name}/{name}"] = parameter.detach().cpu().contiguous().clone()
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{group.name}/{name}#{key}"] = torch.as_tensor(value).cpu().contiguous().clone()
    save_file(weights, directory / "weights.safetensors")
    save_file(moments, directory / "optimizer.safetensors")
    for name, tensors in (("recipe", state.recipe.tensors), ("averages", state.averages), ("best", state.best)):
        kept = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        save_file(kept, directory / f"{name}.safetensors")
    values = {"counters": state.counters, "recipe": state.recipe.values, "stopping": state.stopping}
    (directory / "state.json").write_bytes(canonical_json(values))


def read_checkpoint(directory: Path, *, groups: list[ParameterGroup], optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Load a checkpoint into parameters and optimizer, and return the rest.

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
                parameter.copy_(weights[key])
                slots = {slot.partition("#")[2]: value for slot, value in moments.items() if slot.startswith(f"{key}#")}
                for slot, value in slots.items():
                    # Fused AdamW wants its step counter, too, where the parameter is.
                    optimizer.state[parameter][slot] = value.to(parameter.device)
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
        averages=load_file(directory / "averages.safetensors"),
        best=load_file(directory / "best.safetensors"),
        stopping=dict(state["stopping"]),
    )
