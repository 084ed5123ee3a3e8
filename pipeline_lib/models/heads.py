"""A scalar head on a language model's backbone: reward models and value functions.

Legend: P flat positions, R responses, N counted tokens, D width.
A reward model is stored in the standard form of a sequence-classification model with one label,
so other software can load it; its head has no bias, `normalization.json` holds gain and bias.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pipeline_lib.models.backbone import hidden_states
from pipeline_lib.models.virtual_tokens import attach_saved
from pipeline_lib.text.pack import TreeBatch


def load_scalar_model(directory: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load a backbone with a one-label head; the head is missing, and random, in a language model."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )  # fmt: skip
    return attach_saved(model, directory)


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the scalar head of a sequence-classification model."""
    head = model.score
    assert isinstance(head, nn.Linear)
    assert head.out_features == 1
    return head


def init_head(model: PreTrainedModel, *, seed: int) -> None:
    """Draw the head from N(0, 1/(d+1)), as Ziegler et al. 2019 do (standard deviation 1/sqrt(d+1))."""
    head = head_of(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(drawn)


def scalar_at(hidden_PD: Tensor, head_weight_1D: Tensor, positions: Tensor) -> Tensor:
    """Apply a scalar head at some flat positions, in float32 or wider."""
    chosen = hidden_PD[positions]
    wide = torch.promote_types(chosen.dtype, torch.float32)
    return (chosen.to(wide) @ head_weight_1D.to(wide).T).squeeze(-1)


def run_scalar(model: PreTrainedModel, batch: TreeBatch, head_weight_1D: Tensor, positions: Tensor) -> Tensor:
    """Run a backbone over a batch and a scalar head at some flat positions, `(len(positions),)`."""
    return scalar_at(hidden_states(model, batch, read=positions), head_weight_1D, positions)


def scores(model: PreTrainedModel, batch: TreeBatch) -> Tensor:
    """Score each response of a batch at its last token, `(R,)`, raw: not normalised."""
    return run_scalar(model, batch, head_of(model).weight, batch.last_R)
