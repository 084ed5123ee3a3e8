"""A prompt-tuned model as a plain one: its virtual tokens become tokens of the vocabulary.

Other software serves it without knowing of them: the chat template puts them first, and the
generation settings keep them from being sampled. Logits of the old tokens are what they were. The
artifact keeps the tokens apart: as part of the vocabulary they would take part in every softmax.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline_lib.errors import ConfigError
from pipeline_lib.models.virtual_tokens import virtual_tokens_of


def bake(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Turn a model's virtual tokens into vocabulary, in place, in the model and in its tokenizer.

    Args:
        model: The model, with or without virtual tokens; has none afterwards.
        tokenizer: Its tokenizer; its template then begins with the new tokens.

    Returns:
        Ids of the new tokens; empty where the model had no virtual tokens.

    Raises:
        ConfigError: They are keys and values of every layer, which no vocabulary holds.
    """
    tokens = virtual_tokens_of(model)
    if tokens is None:
        return []
    if tokens.kind == "prefix":
        raise ConfigError(
            "a prefix-tuned model needs trained keys and values at every layer, which the model registry's "
            "transformers models cannot carry",
            next_step="train candidates that are to be promoted with adapter.name: prompt or lora; "
            "the model's artifact itself works everywhere in prefline",
        )
    tokens.detach_from(model)
    names = [f"<|virtual_{index}|>" for index in range(tokens.num_tokens)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids: list[int] = tokenizer.convert_tokens_to_ids(names)
    num_rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(max(num_rows, max(ids) + 1), mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        if head.weight is not embedding.weight:
            head.weight[num_rows:] = 0
        embedding.weight[ids] = tokens.values.to(embedding.weight)
    model.generation_config.suppress_tokens = [*(model.generation_config.suppress_tokens or ()), *ids]
    tokenizer.chat_template = "".join(names) + str(tokenizer.chat_template)
    return ids
