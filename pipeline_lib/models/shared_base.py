"""Several LoRA adapters on one frozen base: kept beside the merged model, put back, spoken through by name.

A reward model that was trained with an adapter on the very weights that a policy starts from is a few
matrices and a head away from that policy. Merged, it is a model of its own; as an adapter it costs
next to nothing in a process that holds the base anyway.

Legend: D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline_lib.errors import IntegrityError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.models.adapters import switched
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.validation import Frozen

ADAPTER_FOLDER = "adapter"
"""Beside `model/` in an artifact."""
OWN = "default"
"""Name of the adapter that a model was made ready for training with."""
_NOTE, _TENSORS, _HEAD = "adapter.json", "adapter.safetensors", "head"


class AdapterNote(Frozen):
    """What `adapter.json` says."""

    settings: LoraSettings
    """How it was made; the layers are named."""
    base_sha256: dict[str, str]
    """Sha256 of every file that decides what the model under it computes, by name."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter and its head as they were trained: not merged, not rounded."""

    note: AdapterNote
    tensors: dict[str, Tensor]
    """`<layer of the backbone>.A` and `.B`."""
    head_1D: Tensor


def write_adapter(
    wrapper: PeftModel, settings: LoraSettings, head_1D: Tensor, *, base_sha256: Mapping[str, str], directory: Path
) -> bool:
    """Write a model's own adapter and head, before it is merged.

    Args:
        wrapper: The adapted model.
        settings: What the adapter was made with.
        head_1D: The scalar head's weight, `(1, D)`.
        base_sha256: Sha256 of the files of the model under it, by name.
        directory: Where to; it is made.

    Returns:
        False, and nothing is written, where a layer outside of the backbone is adapted too.
    """
    matrices = _matrices(wrapper, OWN)
    adapted = sum(OWN in module.lora_A for module in wrapper.modules() if isinstance(module, LoraLayer))
    if len(matrices) != 2 * adapted:
        return False
    tensors = {_HEAD: head_1D, **matrices}
    targets = wrapper.peft_config[OWN].target_modules
    note = AdapterNote(
        settings=settings.model_copy(update={"target_modules": tuple(sorted(targets))}), base_sha256=dict(base_sha256)
    )
    directory.mkdir(parents=True)
    save_file(
        {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, directory / _TENSORS
    )
    (directory / _NOTE).write_bytes(canonical_json(note.model_dump(mode="json")))
    return True


def read_adapter(directory: Path) -> StoredAdapter | None:
    """Read what `write_adapter` wrote, from verified files; None where there is nothing."""
    if not (directory / _NOTE).exists():
        return None
    tensors = load_file(directory / _TENSORS)
    head_1D = tensors.pop(_HEAD)
    return StoredAdapter(AdapterNote.model_validate_json((directory / _NOTE).read_bytes()), tensors, head_1D)


def put_adapter(wrapper: PeftModel, name: str, stored: StoredAdapter) -> None:
    """Put a stored adapter, frozen and silent, beside those that are there.

    Raises:
        IntegrityError: Its layers are not those of this model.
    """
    settings = stored.note.settings
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none",
        target_modules=list(settings.target_modules), use_rslora=settings.use_rslora,
    )  # fmt: skip
    _add(wrapper, name, config)
    here = _matrices(wrapper, name)
    if {key: value.shape for key, value in here.items()} != {key: value.shape for key, value in stored.tensors.items()}:
        raise IntegrityError(
            f"the adapter {name!r} has {len(stored.tensors)} matrices that do not go on this model's {len(here)}",
            next_step="train the reward model again on the model that the policy starts from",
        )
    with torch.no_grad():
        for key, value in here.items():
            value.copy_(stored.tensors[key]).requires_grad_(False)


def add_trained_adapter(wrapper: PeftModel, name: str, *, seed: int) -> None:
    """Put a new adapter of the same form as the model's own beside those that are there; it is trained, and silent.

    It changes nothing at first, and starts as the model's own would from this seed.
    """
    config = copy.deepcopy(wrapper.peft_config[OWN])
    torch.manual_seed(seed)
    _add(wrapper, name, config)
    for matrix in _matrices(wrapper, name).values():
        matrix.requires_grad_(True)


def only_adapters(wrapper: PeftModel, *names: str) -> AbstractContextManager[None]:
    """Let some adapters speak, added up, and no other; which weights are trained stays as it is.

    A backward pass that computes activations again must run inside too.
    """
    return switched(wrapper, "_active_adapter", to=list(names))


def _add(wrapper: PeftModel, name: str, config: LoraConfig) -> None:
    """Add an adapter; everything else stays trained or frozen as it was."""
    trained = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    wrapper.add_adapter(name, config)
    for parameter in trained:
        parameter.requires_grad_(True)


def _matrices(wrapper: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Return the matrices of an adapter in the backbone, as `<layer>.A` and `<layer>.B`."""
    model: PreTrainedModel = wrapper.get_base_model()
    backbone: nn.Module = model.base_model
    found: dict[str, nn.Parameter] = {}
    for layer_name, layer in backbone.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            for part, matrices in (("A", layer.lora_A), ("B", layer.lora_B)):
                weight = matrices[name].weight
                assert isinstance(weight, nn.Parameter)
                found[f"{layer_name}.{part}"] = weight
    return found
