"""Refuse a run that cannot fit before it starts, by an estimate that errs on the small side."""

from __future__ import annotations

import psutil

from pipeline_lib.errors import MemoryLimitError
from pipeline_lib.models.settings import can_share
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.training.group_settings import GroupSettings
from pipeline_lib.training.settings import PpoSettings, TrainingSettings

GIB = 1 << 30
_BYTES_PER_VALUE = 4
_ACTIVATIONS_PER_LAYER = 16
"""Values kept for the backward pass per token, layer and unit of width; measured, rounded down."""


def estimate_bytes(settings: TrainingSettings, *, num_parameters: int, width: int, layers: int, copies: int) -> int:
    """Estimate what a training stage holds: weights, optimizer and the activations of one forward.

    Args:
        settings: The stage's settings.
        num_parameters: Parameters of the base model.
        width: Hidden size.
        layers: Number of layers.
        copies: Whole backbones in memory.
    """
    # Full training adds a gradient and two moments to every trained weight.
    per_copy = 1 if settings.adapter is not None else 4
    weights = num_parameters * _BYTES_PER_VALUE * copies * per_copy
    activations = settings.tokens_per_batch * layers * width * _ACTIVATIONS_PER_LAYER * _BYTES_PER_VALUE
    return weights + activations


def check_memory(config: RunConfig, base: ArtifactRef, store: ArtifactStore) -> None:
    """Compare the largest stage's estimate with the machine's memory or the configured limit.

    Raises:
        MemoryLimitError: Naming the stage, the estimate and the limit.
    """
    shape = store.read_json(base, "model/config.json")
    stored = sum(
        entry.size_bytes for name, entry in store.manifest(base).files.items() if name.endswith(".safetensors")
    )
    bytes_per_value = 2 if shape.get("dtype") in ("bfloat16", "float16") else 4
    width = int(shape.get("hidden_size") or shape.get("n_embd") or 0)
    layers = int(shape.get("num_hidden_layers") or shape.get("n_layer") or 0)
    limit_gib = config.runtime.max_memory_gib or psutil.virtual_memory().total / GIB
    stages: dict[str, tuple[TrainingSettings, int]] = {
        "sft": (config.sft, 1 if config.sft.select_by is None or config.sft.adapter is None else 2),
        "reward": (config.reward, 1),
        **{f"reward_models.{name}": (further, 1) for name, further in config.reward_models.items()},
        **{name: (candidate, _copies(candidate)) for name, candidate in config.all_candidates().items()},
    }
    for name, (settings, copies) in stages.items():
        need = estimate_bytes(
            settings, num_parameters=stored // bytes_per_value, width=width, layers=layers, copies=copies
        )
        if need > limit_gib * GIB:
            raise MemoryLimitError(
                f"stage {name} needs about {need / GIB:.1f} GiB, {limit_gib:.1f} GiB are there",
                next_step=f"lower {name}.tokens_per_batch (now {settings.tokens_per_batch}), "
                "train an adapter instead of all weights, or take a smaller model.source",
            )


def _copies(settings: TrainingSettings) -> int:
    """Count the backbones that a candidate's training holds, at least: four where PPO trains them whole.

    Reward models' adapters stand on the policy's own base, or each on another.
    """
    if isinstance(settings, GroupSettings):
        # Policy and reward model; where all weights train, what is frozen counts for the rest.
        return 1 if can_share(settings.adapter) else 2
    if not isinstance(settings, PpoSettings):
        return 1
    return (1 if can_share(settings.adapter) else 2) if settings.adapter is not None else 4
