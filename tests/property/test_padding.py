"""Left padding never changes a log-probability: step by step with a cache, padded as much as one likes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline_lib.generation import open_generator
from pipeline_lib.generation import slot_run as slots
from pipeline_lib.generation.contract import Policy
from pipeline_lib.models import sampling
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.sampling import SamplingSettings
from pipeline_lib.text.pack import pad
from tests.toy import short_tree
from tests.unit.generation.tiny_models import ARCHITECTURES, tiny

END, PAD = 2, 0
token_ids = st.lists(st.integers(3, 258), min_size=1, max_size=12)
every_architecture = pytest.mark.parametrize("kind", ARCHITECTURES)
# The models are tiny and the examples many: a busy machine must not fail them by its clock.
unhurried = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def model_of(kind: str) -> PreTrainedModel:
    return tiny(kind, dtype=torch.float64)


@torch.no_grad()
def stepwise_logps(model: PreTrainedModel, prompt: list[int], response: list[int], *, padding: int) -> Tensor:
    """The log-probability of every token of a response, fed one by one behind a prompt with padding on its left."""
    states = DynamicCache(config=model.config)
    mask = torch.tensor([[0] * padding + [1] * len(prompt)])
    fed = torch.tensor([[PAD] * padding + prompt])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for token in response:
        logits = model(
            input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=states, use_cache=True,
            logits_to_keep=1,
        ).logits[0, -1]  # fmt: skip
        found.append(torch.log_softmax(logits, -1)[token])
        fed, positions = torch.tensor([[token]]), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=-1)
    return torch.stack(found)


@every_architecture
@unhurried
@given(prompt=token_ids, response=token_ids, padding=st.integers(1, 20))
def test_left_padding_changes_no_log_probability(
    kind: str, prompt: list[int], response: list[int], padding: int
) -> None:
    alone = stepwise_logps(model_of(kind), prompt, response, padding=0)
    padded = stepwise_logps(model_of(kind), prompt, response, padding=padding)
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5 if kind == "gemma" else 1e-6)


@every_architecture
def test_padding_that_is_not_masked_would_be_noticed(kind: str) -> None:
    prompt, response = [40, 50, 60], [70, 80, 90]
    alone = stepwise_logps(model_of(kind), prompt, response, padding=0)
    seen = stepwise_logps(model_of(kind), [PAD] * 4 + prompt, response, padding=0)
    assert float((seen - alone).abs().min()) > 1e-3


@every_architecture
@pytest.mark.parametrize("name", ["batched", "continuous"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompts=st.lists(token_ids, min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_a_sampler_draws_from_the_probabilities_that_the_trainer_computes(
    kind: str, name: str, prompts: list[list[int]], seed: int
) -> None:
    model, said = model_of(kind), dict[int, list[Tensor]]()
    draw = sampling.draw_tokens

    def listening(logits_BV: Tensor, chosen: SamplingSettings, noise: list[torch.Generator]) -> list[int]:
        tokens = draw(logits_BV, chosen, noise)
        logp_BV = torch.log_softmax(logits_BV.double(), -1)
        for row, (token, generator) in enumerate(zip(tokens, noise, strict=True)):
            said.setdefault(generator.initial_seed(), []).append(logp_BV[row, token])
        return tokens

    generator = open_generator({"name": name}, Policy(Path("nowhere"), lambda: model), eos_id=END, pad_id=PAD)
    with pytest.MonkeyPatch.context() as patch:
        for module in (sampling, slots):
            patch.setattr(module, "draw_tokens", listening)
        chosen = SamplingSettings(max_new_tokens=7, batch_size=3)
        samples = generator.generate(prompts, chosen, seed=seed)
    for index, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True)):
        expected = logps_of_trainer(model, prompt, list(drawn.ids))
        heard = torch.stack(said[sampling.derive_seed(seed, "sample", index)])
        # Both look at logits in float32.
        torch.testing.assert_close(heard, expected.double(), rtol=0, atol=2e-5)


def logps_of_trainer(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    with torch.no_grad():
        return token_logps(model, pad([short_tree("row", prompt, response)], pad_id=PAD)).token_logp_N
