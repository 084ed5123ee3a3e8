"""A model made ready for training: loaded, frozen, adapted; and written back as a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from pipeline_lib.errors import DivergedError
from pipeline_lib.models.adapters import add_lora, merge
from pipeline_lib.models.base import save_model, stored_dtype
from pipeline_lib.models.logprobs import supports_trees
from pipeline_lib.models.precision import default_device, resolve_dtype
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import TrainingSettings


@dataclass
class TrainedModel:
    """A model under training, with adapters or with all its weights."""

    model: PreTrainedModel
    adapter: PeftModel | None
    directory: Path
    """The folder it was loaded from."""

    @property
    def is_packed(self) -> bool:
        """True where the model takes prompt trees."""
        return supports_trees(self.model)

    def group(self, name: str, *, learning_rate: float) -> ParameterGroup:
        """Return what is trained, as one parameter group."""
        trained = {key: value for key, value in self.model.named_parameters() if value.requires_grad}
        return ParameterGroup(name, trained, learning_rate)

    def save(self, directory: Path) -> None:
        """Merge the adapters and write the model in the format that it was stored in.

        Raises:
            DivergedError: The model is, in that format, the one that training began with.
        """
        dtype = stored_dtype(self.directory)
        if self.adapter is None:
            save_model(self.model, directory, dtype=dtype, tokenizer_from=self.directory)
            return
        before = _adapted_weights(self.model, dtype)
        whole = merge(self.adapter)
        after = dict(whole.named_parameters())
        if all(torch.equal(after[name].detach().to(dtype), weight) for name, weight in before.items()):
            raise DivergedError(
                f"training changed no weight in the storage format {dtype}",
                next_step="raise the learning rate or the number of steps",
            )
        save_model(whole, directory, dtype=dtype, tokenizer_from=self.directory)


def prepare(model: PreTrainedModel, directory: Path, settings: TrainingSettings, *, seed: int) -> TrainedModel:
    """Freeze and adapt a loaded model, or make all its weights trainable in fp32.

    Dropout is switched off (the N-details paper, item 13): the model stays in evaluation mode.

    Args:
        model: Freshly loaded.
        directory: The folder it was loaded from.
        settings: LoRA or full training.
        seed: Seed of the adapters' initial weights.
    """
    device = default_device()
    if settings.lora is None:
        model = model.to(device=device, dtype=torch.float32)
        return TrainedModel(model.eval(), None, directory)
    model = model.to(device)
    adapter = add_lora(model, settings.lora, seed=seed)
    adapter.eval() if settings.lora.dropout == 0 else adapter.train()
    return TrainedModel(model, adapter, directory)


def dtype_for(settings: TrainingSettings) -> torch.dtype:
    """Return the format to load a model in for training: fp32 for full training, else as resolved."""
    return torch.float32 if settings.lora is None else resolve_dtype(settings.precision)


def _adapted_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copy the weights that have adapters, in a format, under the names they have without adapters."""
    return {
        name.replace(".base_layer", ""): value.detach().to(dtype, copy=True)
        for name, value in model.named_parameters()
        if name.endswith(".base_layer.weight")
    }
