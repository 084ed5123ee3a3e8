"""Policies of tiny models for the tests of vLLM, what is asked of them, and how far an answer is from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline_lib.generation import open_generator
from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.models.sampling import Sample, SamplingSettings
from pipeline_lib.text.pack import pad
from pipeline_lib.training.generating import mismatch_nats
from pipeline_lib.training.trained_model import TrainedModel, prepare
from tests.toy import LORA, byte_ids, settings, short_tree

PAD, END = 0, 2
PROMPTS = [byte_ids(text) for text in ("a", "what is it?", "and then", "b")]
CHOSEN = SamplingSettings(max_new_tokens=6, batch_size=3)


def fixed(directory: Path) -> Policy:
    return Policy(directory, lambda: load_causal_model(directory, dtype=torch.float32))


def trained(directory: Path, adapter: Any = LORA, *, moved_by: float = 0.0) -> TrainedModel:
    chosen = settings(adapter=adapter)
    found = prepare(load_causal_model(directory, dtype=torch.float32), directory, chosen, seed=1)
    move(found, moved_by)
    return found


def move(model: TrainedModel, by: float) -> None:
    """Change every trained weight a little."""
    with torch.no_grad():
        for number, parameter in enumerate(model.group("all", learning_rate=1.0).parameters.values()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(by * noise)


def opened(policy: Policy, spec: dict[str, Any]) -> Generator:
    return open_generator(spec, policy, eos_id=END, pad_id=PAD)


def drawn_by(generator: Generator, *, seed: int = 7, copies: int = 2, **changes: Any) -> list[Sample]:
    chosen = CHOSEN.model_copy(update=changes)
    return generator.generate(PROMPTS, chosen, seed=seed, samples_per_prompt=copies)


def apart_from(model: Any, samples: list[Sample], *, copies: int = 2, temperature: float = 1.0) -> float:
    """The mismatch as the trainer measures it."""
    rows = []
    for place, one in enumerate(samples):
        tree = short_tree("row", PROMPTS[place // copies], list(one.ids))
        with torch.no_grad():
            rows.append(token_logps(model, pad([tree], pad_id=PAD), temperature=temperature).token_logp_N)
    found = mismatch_nats(samples, rows)
    assert found is not None
    return float(found)
