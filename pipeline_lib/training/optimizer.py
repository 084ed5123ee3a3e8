"""Optimizers and their schedule, by configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from pipeline_lib.errors import ConfigError
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import OptimizerSettings


def learning_rate_at(step: int, num_steps: int, settings: OptimizerSettings) -> float:
    """Return the factor on the peak learning rate at a step, counted from 0.

    Linear warm-up over `warmup_frac` of the steps, `min_warmup_steps` at least, from `warmup_from_frac`;
    then constant, linear to 0, or cosine to `final_frac`.
    """
    warmup = max(math.ceil(settings.warmup_frac * num_steps), settings.min_warmup_steps)
    if step < warmup:
        start = settings.warmup_from_frac
        return start + (1 - start) * (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    done_frac = (step - warmup) / max(1, num_steps - warmup)
    if settings.schedule == "linear":
        return 1.0 - done_frac
    cosine = 0.5 * (1 + math.cos(math.pi * done_frac))
    return settings.final_frac + (1 - settings.final_frac) * cosine


def epsilon_at(step: int, settings: OptimizerSettings) -> float:
    """Return what AdamW adds to its denominator at a step, counted from 0.

    torch divides by sqrt(v / c) + e with c = 1 - beta2^t, TensorFlow 1 in effect by (sqrt(v) + e) / sqrt(c),
    which is torch's form with e / sqrt(c) (the "epsilon hat" of Kingma and Ba 2015, section 2).
    """
    if settings.epsilon_form == "torch":
        return settings.epsilon
    return settings.epsilon / math.sqrt(1 - settings.betas[1] ** (step + 1))


def build_optimizer(groups: Sequence[ParameterGroup], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Make the optimizer that the settings name over the groups' parameters.

    Raises:
        ConfigError: `adamw_8bit` where there is no CUDA or no bitsandbytes.
    """
    slots: list[dict[str, Any]] = [{"params": list(g.parameters.values()), "lr": g.learning_rate} for g in groups]
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(
                slots, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay, fused=True
            )
        case "adafactor":
            return torch.optim.Adafactor(slots, eps=(settings.epsilon, 1e-3), weight_decay=settings.weight_decay)
        case "rmsprop":
            # Smoothing 0.99 and momentum 0 are torch's defaults, with which DPO was published.
            return torch.optim.RMSprop(slots, eps=settings.epsilon, weight_decay=settings.weight_decay)
        case "adamw_8bit":
            return _adamw_8bit(slots, settings)


def _adamw_8bit(slots: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    missing = [
        what
        for what, is_there in (
            ("a CUDA device", torch.cuda.is_available()),
            ("the package bitsandbytes", find_spec("bitsandbytes") is not None),
        )
        if not is_there
    ]
    if missing:
        raise ConfigError(
            f"optimizer.name = 'adamw_8bit' needs {' and '.join(missing)}",
            next_step="use optimizer.name: adamw, or adafactor where memory is short",
        )
    import bitsandbytes  # noqa: PLC0415  (optional, CUDA only)

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        slots, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    return optimizer
