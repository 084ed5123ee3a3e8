"""A frozen base in four bits for QLoRA (Dettmers et al. 2023, arXiv 2305.14314): bitsandbytes on CUDA."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.settings import QloraSettings


def quantize(model: PreTrainedModel, settings: QloraSettings) -> None:
    """Replace the linear layers of a model's backbone by layers of four-bit weights, in place.

    Raises:
        ConfigError: There is no CUDA device, or no bitsandbytes.
    """
    bitsandbytes = _bitsandbytes()
    backbone: nn.Module = model.base_model
    places = [(name, layer) for name, layer in backbone.named_modules() if type(layer) is nn.Linear]
    for name, layer in places:
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
            quant_type=settings.quant_type, compress_statistics=settings.double_quant, device="meta",
        )  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(
            layer.weight.detach().cpu(), requires_grad=False, quant_type=settings.quant_type,
            compress_statistics=settings.double_quant,
        )  # fmt: skip
        packed.bias = layer.bias
        _put(backbone, name, packed.to(layer.weight.device))


def merge_quantized(model: PreTrainedModel) -> None:
    """Put plain linear layers in the place of four-bit ones with adapters: rounded weights plus update.

    So the result is the model that was trained. peft would round the sum to four bits again, which
    loses most of an update.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    bitsandbytes = importlib.import_module("bitsandbytes")
    for name, layer in list(model.named_modules()):
        adapted = cast(Any, layer) if isinstance(layer, LoraLayer) else None
        packed = layer if adapted is None else adapted.get_base_layer()
        if not isinstance(packed, bitsandbytes.nn.Linear4bit):
            continue
        weight = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float()
        if adapted is not None:
            weight = weight + adapted.get_delta_weight("default").float()
        elif name.endswith(".base_layer"):
            continue  # comes with the adapter's layer
        with torch.device("meta"):
            plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = packed.bias
        _put(model, name, plain)


def _put(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, layer)


def _bitsandbytes() -> ModuleType:
    missing = [] if torch.cuda.is_available() else ["a CUDA device"]
    missing += [] if importlib.util.find_spec("bitsandbytes") else ["the package bitsandbytes"]
    if missing:
        raise ConfigError(
            f"adapter.name: qlora needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not here",
            next_step="run where both are, or take adapter.name: lora",
        )
    return importlib.import_module("bitsandbytes")
