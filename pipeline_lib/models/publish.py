"""Hand a model to MLflow's transformers flavour, and prove that what comes back is the model."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline_lib.errors import IntegrityError
from pipeline_lib.models.baking import bake
from pipeline_lib.models.base import load_causal_model, stored_dtype
from pipeline_lib.schema import Message, Role
from pipeline_lib.text.chat_template import ChatTokenizer

MAX_LOGIT_DIFFERENCE = 1e-3
_DIALOGUE: tuple[tuple[Role, str], ...] = (("user", "Hi."), ("assistant", "Yes?"), ("user", "What is 2 + 2?"))


def log_and_verify(directory: Path, log_model: Callable[..., Any], load_model: Callable[..., Any]) -> str:
    """Log a model folder and compare logits of what is loaded back on fixed token ids.

    Args:
        directory: The `model/` folder of a model artifact, whole weights; virtual tokens of prompt
            tuning go into the vocabulary.
        log_model: `mlflow.transformers.log_model`, to be called inside a run.
        load_model: `mlflow.transformers.load_model`.

    Returns:
        The logged model's URI.

    Raises:
        ConfigError: The model is prefix-tuned, which the registry cannot hold.
        IntegrityError: The model loaded back answers differently, or its tokenizer writes another prompt.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    chat = ChatTokenizer.load(directory)
    model = load_causal_model(directory, dtype=stored_dtype(directory))
    ids = chat.ids("Which model is this? 0123456789")[:32]
    expected = _logits(model, ids)
    first_ids = bake(model, chat.tokenizer)
    packages = ("torch", "transformers", "accelerate")
    logged = log_model(
        {"model": model, "tokenizer": chat.tokenizer}, name="model", task="text-generation",
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in packages],
    )  # fmt: skip
    parts = load_model(logged.model_uri, return_type="components")
    _require_template(chat, parts["tokenizer"])
    found = _logits(parts["model"].cpu(), [*first_ids, *ids])[len(first_ids) :, : expected.shape[1]]
    apart = float((found - expected).abs().max())
    if not apart <= MAX_LOGIT_DIFFERENCE:
        raise IntegrityError(
            f"the model that MLflow loads back differs from {directory.name}: logits by up to {apart:.3g}",
            next_step="the registry was not changed; report this as a bug with both folders",
        )
    uri: str = logged.model_uri
    return uri


def _require_template(chat: ChatTokenizer, served: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that renders a dialogue in another way than in training, or to other ids."""
    turns = tuple(Message(role=role, content=text) for role, text in _DIALOGUE)
    mine, theirs = (
        each.render(turns, add_generation_prompt=True) for each in (chat, ChatTokenizer(served))
    )  # fmt: skip
    if mine != theirs or chat.ids(mine) != ChatTokenizer(served).ids(mine):
        raise IntegrityError(
            f"the chat template that MLflow loads back is not the one of training: {theirs!r} instead of {mine!r}",
            next_step="the registry was not changed; report this as a bug with both folders",
        )


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the logits of every position, `(T, V)`.

    In float32, and then back: in bf16 the same weights at another place in memory can give other
    roundings.
    """
    dtype = model.dtype
    with torch.inference_mode():
        logits: Tensor = model.float()(torch.tensor([ids])).logits[0]
    model.to(dtype)
    return logits
