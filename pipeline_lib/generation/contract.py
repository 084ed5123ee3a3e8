"""What a generator is: prompts in, sampled responses out, from the weights that it was given last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline_lib.models.adapters import Adapter
    from pipeline_lib.models.sampling import Sample, SamplingSettings


@dataclass(frozen=True)
class Policy:
    """The model that responses are sampled from."""

    directory: Path
    """The folder that it was loaded from, its tokenizer's files among it."""
    load: Callable[[], PreTrainedModel]
    """Returns the model with the weights that it has now; called only where they are needed in this process."""
    adapter: Adapter | None = None
    """The adapter in it or the virtual tokens in front of it; the weights below it are those of the folder."""
    adapter_name: str = "default"
    """Which adapter it is, where there are several on one base."""
    is_trained: bool = False
    """True where the model has other weights than its folder, or will have."""


class Generator(Protocol):
    """Samples responses."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample responses, one a prompt or several.

        Args:
            prompts: Token ids, unpadded, none empty.
            settings: Temperature, limits and how many responses are written at once.
            seed: A sample is a function of (seed, its index, its prompt, the weights), of a server as far as the
                server's own arithmetic is.
            samples_per_prompt: Samples of each prompt, which share its keys and values.
            on_batch: Called now and then with the number of prompts done; what it raises ends the sampling.

        Returns:
            The samples of the first prompt, then those of the next, in the order given.

        Raises:
            GeneratorError: A server does not answer, or not as it must.
        """

    def update(self, policy: Policy) -> None:
        """Sample from the weights that a policy has now.

        Raises:
            GeneratorError: A server did not take them.
        """


@runtime_checkable
class GeneratorSettings(Protocol):
    """A generator in a configuration: one frozen class, its fields its parameters."""

    def open(self, policy: Policy, *, eos_id: int, pad_id: int) -> Generator:
        """Return the generator, ready to sample from a policy.

        Raises:
            ConfigError: It cannot sample from this policy, or is not installed.
            GeneratorError: Its server does not answer.
        """
