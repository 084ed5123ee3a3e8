"""The generators of responses: one a file, and this table. docs/methods/rollouts.md says which is for what."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from pipeline_lib.generation.contract import Generator, GeneratorSettings, Policy
from pipeline_lib.registry import PluginSpec, Table

_HERE = "pipeline_lib.generation"

GENERATORS = Table(
    "generator",
    {
        "batched": f"{_HERE}.batched:Batched",
        "continuous": f"{_HERE}.continuous:Continuous",
        "vllm": f"{_HERE}.vllm:Vllm",
    },
)


GeneratorSpec = Annotated[PluginSpec, AfterValidator(GENERATORS.complete)]
"""A generator in a configuration: `{name: ..., parameter: value}`."""


def open_generator(spec: PluginSpec, policy: Policy, *, eos_id: int, pad_id: int) -> Generator:
    """Return the generator that a configuration names, ready to sample from a policy.

    Args:
        spec: As in a configuration.
        policy: What is sampled from first; `update` hands over what it becomes.
        eos_id: Token that ends a turn.
        pad_id: Token that fills rows up where rows are filled up; masked.

    Raises:
        ConfigError: The generator or a parameter is unknown, or it cannot sample from this policy.
        GeneratorError: Its server does not answer.
    """
    settings = GENERATORS.build(spec)
    assert isinstance(settings, GeneratorSettings)
    return settings.open(policy, eos_id=eos_id, pad_id=pad_id)
