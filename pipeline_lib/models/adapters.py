"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) through peft: add, switch off, merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline_lib.models.settings import LoraSettings


def add_lora(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Put adapters into the linear layers of a model's backbone, in place.

    All of the model's own weights are frozen. B starts at 0, so the model's output is unchanged.

    Args:
        model: The model to adapt; it stays usable, its layers now hold the adapters.
        settings: Rank, scale, dropout and which layers.
        seed: Seed of the adapters' random half (A).

    Returns:
        peft's wrapper, needed to switch off and to merge.
    """
    backbone: nn.Module = model.base_model
    leaves = {
        name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    targets = settings.target_modules or sorted(leaves)
    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none",
            target_modules=list(targets),
        ),
    )  # fmt: skip


@contextmanager
def without_adapter(wrapper: PeftModel | None) -> Iterator[None]:
    """Run the frozen model: as a reference, or as the reward under a value function."""
    if wrapper is None:
        yield
        return
    with wrapper.disable_adapter():
        yield


def merge(wrapper: PeftModel) -> PreTrainedModel:
    """Add the adapters into the weights and take them out; refuses non-finite results."""
    merged: PreTrainedModel = wrapper.merge_and_unload(safe_merge=True)
    return merged
