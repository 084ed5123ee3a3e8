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
        before = {name: value.detach().to(dtype) for name, value in _originals(self.model).items()}
        whole = self.model if self.adapter is None else merge(self.adapter)
        after = {name: value.detach().to(dtype) for name, value in whole.named_parameters()}
        if self.adapter is not None and all(torch.equal(after[name], before[name]) for name in before):
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


def _originals(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's own weights under the names they have without adapters."""
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if ".lora_" not in name
    }
