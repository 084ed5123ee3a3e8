"""Virtual tokens: trained vectors in front of every sequence (prefix tuning, prompt tuning).

Prefix tuning (Li and Liang 2021, arXiv 2101.00190) trains keys and values at every layer, prompt
tuning (Lester et al. 2021, arXiv 2104.08691) input embeddings. Both are put in where the backbone
is called, so scoring packed trees or padded rows, sampling and generating need not know of them:
every real token attends to all virtual ones, and its position counts from their number on, as in
peft, whose file format is used.

Legend: B rows, T columns, n virtual tokens, D width, L layers, H key heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from pipeline_lib.errors import ConfigError, IntegrityError

FOLDER = "virtual_tokens"
"""Folder of a model folder that holds them."""
WEIGHTS_FILE = "adapter_model.safetensors"
_ATTRIBUTE = "virtual_tokens"

Kind = Literal["prefix", "prompt"]


class VirtualTokens(nn.Module):
    """The vectors, part of the backbone that they stand in front of."""

    def __init__(self, kind: Kind, values: Tensor, *, layers: int, heads: int) -> None:
        """Take the vectors.

        Args:
            kind: Keys and values of all layers, or input embeddings.
            values: `(n, 2 L H W)` laid out as `(n, layer, key or value, H, W)`, or `(n, D)`.
            layers: L, the backbone's layers.
            heads: H, its key heads.
        """
        super().__init__()
        self.kind: Kind = kind
        self.layers, self.heads = layers, heads
        self.values = nn.Parameter(values.detach().float().clone())
        self.before: Tensor | None = None
        """What stands there when these are switched off: nothing, or what training began with."""
        self._start: Tensor | None = None
        self.is_on = True
        self._cut = self._num_calls = 0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return int(self.values.shape[0])

    def attach(self, model: PreTrainedModel) -> VirtualTokens:
        """Become part of a model's backbone; the model's own forward then begins with the tokens.

        Raises:
            ConfigError: The model's forward does not pass through its backbone as a whole.
        """
        backbone: nn.Module = model.base_model
        self.to(next(backbone.parameters()).device)
        setattr(backbone, _ATTRIBUTE, self)
        self._hooks = [
            backbone.register_forward_pre_hook(self._put_in, with_kwargs=True),
            backbone.register_forward_hook(self._cut_out, with_kwargs=True),
        ]
        if model.can_generate():
            self._require_effect(model)
        return self

    @torch.no_grad()
    def _require_effect(self, model: PreTrainedModel) -> None:
        """Refuse a model that would be sampled from without the tokens, as OPT's decoder is."""
        self._num_calls = 0
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
        if self._num_calls == 0:
            self.detach_from(model)
            raise ConfigError(
                f"virtual tokens cannot be put in front of a {model.config.model_type!r} model",
                next_step="take adapter.name: lora",
            )

    def detach_from(self, model: PreTrainedModel) -> None:
        """Leave the model as it is without them."""
        for hook in self._hooks:
            hook.remove()
        delattr(model.base_model, _ATTRIBUTE)

    def begin_training(self, *, is_fresh: bool) -> None:
        """Make them trainable; switched off, a fresh set is none and a loaded one what it is now."""
        self._start = self.values.detach().clone()
        self.before = None if is_fresh else self._start
        self.values.requires_grad = True

    @property
    def has_changed(self) -> bool:
        """True where they are no longer what they were when training began."""
        return self._start is None or not torch.equal(self.values, self._start)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Run the model that training began with."""
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True

    def _put_in(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Put the tokens in front of a call of the backbone."""
        self._cut, self._num_calls = 0, self._num_calls + 1
        values = self.values if self.is_on else self.before
        if values is None:
            return args, kwargs
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        num = int(values.shape[0])
        cache: Cache | None = kwargs.get("past_key_values")
        is_first = cache is None or cache.get_seq_length() == 0
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + num
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = _seeing_all(mask, num)
        if not is_first:
            return (), kwargs
        if self.kind == "prefix":
            kwargs["past_key_values"] = self._filled(cache, values, backbone, rows=_rows_of(kwargs))
        else:
            self._embed(backbone, values, kwargs)
        return (), kwargs

    def _cut_out(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ARG002
        """Take the positions of the tokens out of the output."""
        if self._cut:
            output.last_hidden_state = output.last_hidden_state[:, self._cut :]
        return output

    def _filled(self, cache: Cache | None, values: Tensor, backbone: nn.Module, *, rows: int) -> Cache:
        """Return a cache that holds the keys and values of every layer."""
        filled = DynamicCache(config=backbone.config) if cache is None else cache
        num = values.shape[0]
        layers = values.to(_embedding_of(backbone).weight.dtype).view(num, self.layers, 2, self.heads, -1)
        layers_L2BHnW = layers.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, rows, -1, -1, -1)
        for index, (key_BHnW, value_BHnW) in enumerate(layers_L2BHnW):
            filled.update(key_BHnW, value_BHnW, index)
        return filled

    def _embed(self, backbone: nn.Module, values: Tensor, kwargs: dict[str, Any]) -> None:
        """Replace token ids by embeddings that begin with the tokens."""
        ids_BT = kwargs.pop("input_ids", None)
        real_BTD = kwargs.get("inputs_embeds")
        if real_BTD is None:
            real_BTD = _embedding_of(backbone)(ids_BT)
        rows, num = real_BTD.shape[0], values.shape[0]
        kwargs["inputs_embeds"] = torch.cat([values.to(real_BTD.dtype).expand(rows, -1, -1), real_BTD], dim=1)
        positions = kwargs.get("position_ids")
        if positions is not None:
            own = torch.arange(num, device=positions.device).expand(positions.shape[0], -1)
            kwargs["position_ids"] = torch.cat([own, positions], dim=1)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            kwargs["attention_mask"] = _with_own_rows(mask, num)
        self._cut = int(num)

    def write(self, directory: Path) -> None:
        """Write them in peft's format, so that `PeftModel.from_pretrained(base, directory)` takes them too."""
        directory.mkdir(parents=True, exist_ok=True)
        width = self.values.shape[1]
        make = PrefixTuningConfig if self.kind == "prefix" else PromptTuningConfig
        config: PeftConfig = make(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.num_tokens, num_layers=self.layers,
            token_dim=width // (2 * self.layers) if self.kind == "prefix" else width,
            num_attention_heads=self.heads, num_transformer_submodules=1, inference_mode=True,
        )  # fmt: skip
        config.save_pretrained(str(directory))
        save_file({"prompt_embeddings": self.values.detach().cpu().contiguous()}, directory / WEIGHTS_FILE)


def virtual_tokens_of(model: PreTrainedModel) -> VirtualTokens | None:
    """Return the virtual tokens that a model has."""
    found = getattr(model.base_model, _ATTRIBUTE, None)
    assert found is None or isinstance(found, VirtualTokens)
    return found


def attach_saved(model: PreTrainedModel, model_directory: Path) -> PreTrainedModel:
    """Attach the virtual tokens of a model folder, frozen, where it has some.

    Raises:
        IntegrityError: Their files are not those of virtual tokens.
    """
    directory = model_directory / FOLDER
    if not directory.is_dir():
        return model
    config = PeftConfig.from_pretrained(str(directory))
    weights = load_file(directory / WEIGHTS_FILE)
    if not isinstance(config, PrefixTuningConfig | PromptTuningConfig) or set(weights) != {"prompt_embeddings"}:
        raise IntegrityError(
            f"{directory} holds no virtual tokens but {config.peft_type}", next_step="run the stage again that made it"
        )
    kind: Kind = "prefix" if isinstance(config, PrefixTuningConfig) else "prompt"
    assert config.num_layers is not None
    assert config.num_attention_heads is not None
    tokens = VirtualTokens(
        kind, weights["prompt_embeddings"], layers=config.num_layers, heads=config.num_attention_heads
    )
    tokens.requires_grad_(requires_grad=False)
    tokens.attach(model)
    return model


def fresh_tokens(model: PreTrainedModel, kind: Kind, ids: list[int]) -> VirtualTokens:
    """Return virtual tokens that start as real ones.

    As a prompt they are the tokens' embeddings; as a prefix the keys and values that the model
    computes for them, so that at first the model answers as if the text stood before every prompt.

    Args:
        model: The model, without virtual tokens.
        kind: Prefix or prompt.
        ids: One token id for each virtual token.

    Raises:
        ConfigError: The model's layers do not all keep the keys of all positions, in one shape.
    """
    backbone: nn.Module = model.base_model
    ids_1n = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        cache: Cache = backbone(input_ids=ids_1n, use_cache=True).past_key_values
        shapes = {tuple(layer.keys.shape) for layer in cache.layers}
        heads = cache.layers[0].keys.shape[1]
        if kind == "prompt":
            values = _embedding_of(backbone)(ids_1n)[0]
            return VirtualTokens(kind, values, layers=len(cache.layers), heads=heads)
        if len(shapes) != 1 or any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ConfigError(
                f"prefix tuning needs layers that all see the whole text; those of a {model.config.model_type!r} "
                "model do not",
                next_step="take adapter.name: prompt or lora",
            )
        both_L2HnW = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        values = both_L2HnW.permute(3, 0, 1, 2, 4).reshape(len(ids), -1)
    return VirtualTokens(kind, values, layers=len(cache.layers), heads=heads)


def _seeing_all(mask: Tensor, num: int) -> Tensor:
    """Let every position of a mask, `(B, T)` or `(B, 1, T, T)`, see the tokens in front of it."""
    seen: bool | int = True if mask.dtype == torch.bool else (1 if mask.ndim == 2 else 0)
    return torch.cat([mask.new_full((*mask.shape[:-1], num), seen), mask], dim=-1)


def _with_own_rows(mask_B1TC: Tensor, num: int) -> Tensor:
    """Give a prepared mask the rows of the tokens themselves: each sees those before it and itself."""
    hidden: bool | float = False if mask_B1TC.dtype == torch.bool else torch.finfo(mask_B1TC.dtype).min
    seen: bool | float = True if mask_B1TC.dtype == torch.bool else 0.0
    own = mask_B1TC.new_full((*mask_B1TC.shape[:2], num, mask_B1TC.shape[-1]), hidden)
    may_see = torch.ones(num, mask_B1TC.shape[-1], dtype=torch.bool, device=mask_B1TC.device).tril()
    return torch.cat([own.masked_fill(may_see, seen), mask_B1TC], dim=-2)


def _rows_of(kwargs: dict[str, Any]) -> int:
    given = kwargs.get("input_ids")
    given = kwargs["inputs_embeds"] if given is None else given
    return int(given.shape[0])


def _embedding_of(backbone: nn.Module) -> nn.Embedding:
    assert isinstance(backbone, PreTrainedModel)
    embedding = backbone.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding
