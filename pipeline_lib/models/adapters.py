"""Parameter-efficient training: few trained weights in or in front of a frozen model, on, off, merged.

LoRA (Hu et al. 2021, arXiv 2106.09685) with rsLoRA and DoRA, QLoRA, and IA3 (Liu et al. 2022, arXiv
2205.05638) run through peft and are merged into the weights at the end. Prefix and prompt tuning
stand in front of every sequence (`models/virtual_tokens.py`) and are kept beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, assert_never

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.fused_lora import fuse_lora
from pipeline_lib.models.quantized import quantize
from pipeline_lib.models.settings import (
    AdapterSettings,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    QloraSettings,
)
from pipeline_lib.models.virtual_tokens import VirtualTokens, fresh_tokens, virtual_tokens_of

Adapter = PeftModel | VirtualTokens
"""What was put into a model: peft's wrapper, or the tokens in front."""


def add_adapter(
    model: PreTrainedModel, settings: AdapterSettings, *, seed: int, encode: Callable[[str], list[int]]
) -> Adapter:
    """Put trained weights into a model or in front of it, in place; all of its own are frozen.

    What peft adds leaves the model's output as it is; virtual tokens that are new do not.

    Args:
        model: The model to adapt, on the device that it trains on.
        settings: Which method, and its parameters.
        seed: Seed of what starts at random.
        encode: The tokenizer, for virtual tokens that start as a text.

    Returns:
        What is needed to switch off and to merge.

    Raises:
        ConfigError: The method and the model do not go together, or QLoRA's needs are not met.
    """
    model.requires_grad_(requires_grad=False)
    torch.manual_seed(seed)
    match settings:
        case LoraSettings() | QloraSettings():
            if isinstance(settings, QloraSettings):
                quantize(model, settings)
            wrapper: Adapter = get_peft_model(model, _lora_config(model, settings))
            fuse_lora(model)
        case Ia3Settings():
            wrapper = get_peft_model(model, _ia3_config(model, settings))
        case PrefixSettings() | PromptSettings():
            wrapper = _virtual_tokens(model, settings, encode)
        case _:
            assert_never(settings)
    _switch_dropout_on(model)
    return wrapper


def _lora_config(model: PreTrainedModel, settings: LoraSettings | QloraSettings) -> PeftConfig:
    leaves = {name.rsplit(".", 1)[-1] for name, module in _linear_layers(model)}
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none",
        target_modules=list(settings.target_modules or sorted(leaves)), use_rslora=settings.use_rslora,
        use_dora=isinstance(settings, LoraSettings) and settings.use_dora,
    )  # fmt: skip


def _ia3_config(model: PreTrainedModel, settings: Ia3Settings) -> PeftConfig:
    kind = str(model.config.model_type)
    targets = list(settings.target_modules) or TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if targets is None:
        names = sorted({name.rsplit(".", 1)[-1] for name, _ in _linear_layers(model)})
        raise ConfigError(
            f"which layers of a {kind!r} model IA3 scales is not known",
            next_step=f"set adapter.target_modules and adapter.feedforward_modules to some of {', '.join(names)}",
        )
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    feedforward = list(settings.feedforward_modules) or [name for name in known if name in targets]
    if not set(feedforward) <= set(targets):
        raise ConfigError(
            f"adapter.feedforward_modules {feedforward} are not all in adapter.target_modules {targets}",
            next_step="name every feed-forward layer in both",
        )
    return IA3Config(target_modules=targets, feedforward_modules=feedforward)


def _virtual_tokens(
    model: PreTrainedModel, settings: PrefixSettings | PromptSettings, encode: Callable[[str], list[int]]
) -> VirtualTokens:
    found = virtual_tokens_of(model)
    if found is not None:
        if (found.kind, found.num_tokens) != (settings.name, settings.num_tokens):
            raise ConfigError(
                f"the model already has {found.num_tokens} virtual tokens by {found.kind} tuning; "
                f"{settings.num_tokens} by {settings.name} tuning cannot be added",
                next_step=f"train those on (adapter: {{name: {found.kind}, num_tokens: {found.num_tokens}}}), "
                "or take adapter.name: lora",
            )
        found.begin_training(is_fresh=False)
        return found
    if settings.init == "text":
        text_ids = encode(settings.text) or [0]
        ids = [text_ids[place % len(text_ids)] for place in range(settings.num_tokens)]
    else:
        ids = torch.randint(0, model.config.vocab_size, (settings.num_tokens,)).tolist()
    tokens = fresh_tokens(model, settings.name, ids).attach(model)
    tokens.begin_training(is_fresh=True)
    return tokens


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    backbone: nn.Module = model.base_model
    return [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _switch_dropout_on(model: nn.Module) -> None:
    """Put the adapters' dropout into training mode, and nothing else: the model's own is always off."""
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for dropout in module.lora_dropout.values():
                dropout.train(isinstance(dropout, nn.Dropout))


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch all dropout off, to sample or to measure, and give every part its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapter(adapter: Adapter | None) -> Iterator[None]:
    """Run the frozen model: as a reference, or as the reward under a value function."""
    if isinstance(adapter, VirtualTokens):
        off = adapter.switched_off()
    else:
        off = nullcontext() if adapter is None else switched(adapter, "_disable_adapters", to=True)
    with off:
        yield


@contextmanager
def switched(
    wrapper: PeftModel, switch: Literal["_active_adapter", "_disable_adapters"], *, to: object
) -> Iterator[None]:
    """Set a switch of every adapted layer for a while; which weights are trained stays as it is.

    peft's own ways change that too, and one of them asks every weight how it is: many times as long, at each forward.
    """
    layers = [module for module in wrapper.modules() if isinstance(module, BaseTunerLayer)]
    before = [getattr(layer, switch) for layer in layers]
    for layer in layers:
        setattr(layer, switch, to)
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            setattr(layer, switch, was)
