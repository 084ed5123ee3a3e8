"""Configuration of models, shared by every stage that loads one. Light: imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline_lib.validation import Frozen

Precision = Literal["auto", "fp32", "bf16"]


class _LowRank(Frozen):
    """What the low-rank adapters have in common."""

    name: str
    rank: int = Field(16, ge=1, le=1024)
    """Rank of the update."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / rank, with `use_rslora` by alpha / sqrt(rank)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input, while training; PPO takes none."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: all of the backbone."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps the size of the update at high ranks."""


class LoraSettings(_LowRank):
    """Low-rank adapters (Hu et al. 2021); merged into the weights when training ends."""

    name: Literal["lora"] = "lora"
    use_dora: bool = False
    """Train each weight column's magnitude apart from its direction (Liu et al. 2024)."""


class QloraSettings(_LowRank):
    """Low-rank adapters on a base in four bits (Dettmers et al. 2023); needs CUDA and bitsandbytes."""

    name: Literal["qlora"] = "qlora"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Format of the frozen weights."""
    double_quant: bool = True
    """Quantise the scales too."""


class Ia3Settings(Frozen):
    """Learnt scales of keys, values and feed-forward activations (Liu et al. 2022); merged at the end."""

    name: Literal["ia3"] = "ia3"
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers to scale; empty: those of the architecture that the paper scales."""
    feedforward_modules: tuple[str, ...] = ()
    """Those of them whose input is scaled instead of their output; a part of `target_modules`."""


class _Virtual(Frozen):
    """What methods have in common that put trained vectors in front of every sequence."""

    name: str
    num_tokens: int = Field(20, ge=1, le=1024)
    """Virtual tokens in front of every sequence."""
    init: Literal["text", "random"] = "text"
    """What they start as: the tokens of `text`, repeated or cut; or tokens drawn from the vocabulary."""
    text: str = Field("You are a helpful, honest and harmless assistant. Answer the user's request.", min_length=1)
    """The text that they start as, with `init: text`."""


class PrefixSettings(_Virtual):
    """Trained keys and values in front of every layer (Li and Liang 2021); kept beside the weights."""

    name: Literal["prefix"] = "prefix"


class PromptSettings(_Virtual):
    """Trained input embeddings in front of every sequence (Lester et al. 2021); kept beside the weights."""

    name: Literal["prompt"] = "prompt"


def _lora_unless_named(value: Any) -> Any:
    return {"name": "lora", **value} if isinstance(value, dict) and "name" not in value else value


AdapterSettings = Annotated[
    LoraSettings | QloraSettings | Ia3Settings | PrefixSettings | PromptSettings,
    Field(discriminator="name"),
    BeforeValidator(_lora_unless_named),
]
"""Which few weights are trained; a section without a name is LoRA's."""


def can_share(settings: AdapterSettings | None) -> bool:
    """Tell whether an adapter only adds to a layer's output, so that several can stand on one layer."""
    return isinstance(settings, LoraSettings) and not settings.use_dora
