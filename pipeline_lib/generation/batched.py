"""Batches: prompts sorted by length, as many at once as fit, the next batch when the last row has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.models.sampling import Sample, SamplingSettings


class Batched(Frozen):
    """Batch after batch in this process, for every model; a row that has ended leaves its batch."""

    def open(self, policy: Policy, *, eos_id: int, pad_id: int) -> Generator:
        """Return the generator."""
        return BatchedGenerator(policy, eos_id, pad_id)


@dataclass
class BatchedGenerator:
    """Samples from a model of this process, batch by batch."""

    policy: Policy
    eos_id: int
    pad_id: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample; see `Generator`."""
        from pipeline_lib.models.sampling import sample  # noqa: PLC0415  (torch)

        return sample(
            self.policy.load(), prompts, settings, eos_id=self.eos_id, pad_id=self.pad_id, seed=seed,
            samples_per_prompt=samples_per_prompt, on_batch=on_batch,
        )  # fmt: skip

    def update(self, policy: Policy) -> None:
        """Take a policy: its model is the one that is trained, so there is nothing to hand over."""
        self.policy = policy
