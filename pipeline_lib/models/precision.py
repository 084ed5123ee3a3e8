"""Which number format a model runs in here."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline_lib.models.settings import Precision

_CPUINFO = Path("/proc/cpuinfo")


def default_device() -> torch.device:
    """Return the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(precision: Precision) -> torch.dtype:
    """Return the format of frozen weights and activations.

    `auto` is bf16 on CUDA and on processors that multiply bf16 in hardware, else fp32: emulated
    bf16 is ten times slower than fp32.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" or torch.cuda.is_available() or _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def slow_precision(precision: Precision) -> str | None:
    """Say in one line that the format asked for has no instructions here; None where it has, or none was asked for."""
    if precision != "bf16" or torch.cuda.is_available() or _cpu_multiplies_bf16():
        return None
    return "precision: bf16 is emulated on this processor, ten times slower than fp32 or worse; `auto` takes fp32 here"


def _cpu_multiplies_bf16() -> bool:
    flags = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
