"""Configuration of models, shared by every stage that loads one. Light: imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_lib.validation import Frozen

Precision = Literal["auto", "fp32", "bf16"]


class LoraSettings(Frozen):
    """Low-rank adapters; `lora: null` trains every weight."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: all of the backbone."""
