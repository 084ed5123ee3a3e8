"""A model made ready for training: loaded, frozen, adapted; and written back as a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from pipeline_lib.errors import ConfigError, DivergedError
from pipeline_lib.models.adapters import Adapter, add_adapter
from pipeline_lib.models.base import save_model, stored_dtype
from pipeline_lib.models.lean_norm import lean_norms
from pipeline_lib.models.merging import merge
from pipeline_lib.models.precision import default_device, resolve_dtype
from pipeline_lib.models.settings import PrefixSettings, QloraSettings
from pipeline_lib.models.shared_base import OWN
from pipeline_lib.models.trees import supports_trees
from pipeline_lib.models.virtual_tokens import VirtualTokens, virtual_tokens_of
from pipeline_lib.text.chat_template import ChatTokenizer
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import TrainingSettings


@dataclass
class TrainedModel:
    """A model under training, with adapters or with all its weights."""

    model: PreTrainedModel
    adapter: Adapter | None
    directory: Path
    """The folder it was loaded from."""
    is_quantized: bool = False
    """True where the frozen weights were rounded to four bits."""
    adapter_name: str = OWN
    """Which of the adapters on the base is this model's, where there are several."""

    @property
    def is_packed(self) -> bool:
        """True where the model takes prompt trees."""
        return supports_trees(self.model)

    def group(self, name: str, *, learning_rate: float) -> ParameterGroup:
        """Return what is trained, as one parameter group; another model's adapter on the same base is not."""
        others = self.adapter.peft_config.keys() - {self.adapter_name} if isinstance(self.adapter, PeftModel) else ()
        trained = {
            key: value
            for key, value in self.model.named_parameters()
            if value.requires_grad and not any(f".{other}." in key for other in others)
        }
        return ParameterGroup(name, trained, learning_rate)

    @property
    def starts_as_reference(self) -> bool:
        """True where the model, untrained, answers as the one it was loaded as.

        New virtual tokens stand in front of every prompt from the first step on, and a base in four
        bits is another base.
        """
        if isinstance(self.adapter, VirtualTokens):
            return self.adapter.before is not None
        return not self.is_quantized

    def save(self, directory: Path) -> None:
        """Merge the adapters and write the model in the format that it was stored in.

        Virtual tokens cannot be merged: they are written into a folder beside the weights.

        Raises:
            DivergedError: The model is, in that format, the one that training began with.
        """
        dtype = stored_dtype(self.directory)
        model = self.model
        if isinstance(self.adapter, PeftModel):
            model = merge(self.adapter, dtype=dtype)
        elif self.adapter is not None and not self.adapter.has_changed:
            raise DivergedError(
                "training changed no virtual token", next_step="raise the learning rate or the number of steps"
            )
        save_model(model, directory, dtype=dtype, tokenizer_from=self.directory)


def prepare(model: PreTrainedModel, directory: Path, settings: TrainingSettings, *, seed: int) -> TrainedModel:
    """Freeze and adapt a loaded model, or make all its weights trainable in fp32.

    Dropout is switched off (the N-details paper, item 13): the model stays in evaluation mode.

    Args:
        model: Freshly loaded.
        directory: The folder it was loaded from.
        settings: The adapter, or none for full training.
        seed: Seed of the adapters' initial weights.

    Raises:
        ConfigError: The adapter does not go with the model, the other settings or this machine.
    """
    device = default_device()
    found = virtual_tokens_of(model)
    chosen = settings.adapter
    if settings.gradient_checkpointing and (isinstance(chosen, PrefixSettings) or (found and found.kind == "prefix")):
        raise ConfigError(
            "gradient checkpointing computes a layer again without the trained keys in front of it",
            next_step="set gradient_checkpointing: false, or take another adapter than prefix",
        )
    if chosen is None:
        model = model.to(device=device, dtype=torch.float32).requires_grad_(requires_grad=True)
        lean_norms(model)
        return TrainedModel(model.eval(), None, directory)
    model = model.to(device)
    lean_norms(model)
    adapter = add_adapter(model, chosen, seed=seed, encode=lambda text: ChatTokenizer.load(directory).ids(text))
    return TrainedModel(model, adapter, directory, is_quantized=isinstance(chosen, QloraSettings))


def dtype_for(settings: TrainingSettings) -> torch.dtype:
    """Return the format to load a model in for training: fp32 for full training, else as resolved."""
    return resolve_dtype(settings.model_precision)
