"""Continuous batches: a response that ends makes room for the next prompt, and no prompt is padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_lib.generation.batched import BatchedGenerator
from pipeline_lib.generation.contract import Generator, Policy
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from pipeline_lib.models.sampling import Sample, SamplingSettings


class Continuous(Frozen):
    """Slots that are filled again in this process; models that do not take slots are sampled as by `batched`."""

    def open(self, policy: Policy, *, eos_id: int, pad_id: int) -> Generator:
        """Return the generator."""
        return ContinuousGenerator(policy, eos_id, pad_id)


@dataclass
class ContinuousGenerator(BatchedGenerator):
    """Samples from a model of this process, slot by slot; where it takes no slots, batch by batch."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample; see `Generator`. `settings.batch_size` is the number of slots."""
        from pipeline_lib.generation.slot_run import SlotRun  # noqa: PLC0415  (torch)
        from pipeline_lib.generation.slot_trial import slots_of  # noqa: PLC0415  (torch)

        if not prompts:
            return []
        model = self.policy.load()
        longest = max(map(len, prompts)) + settings.max_new_tokens
        slots = slots_of(model, longest=longest)
        if slots is None:
            return super().generate(
                prompts, settings, seed=seed, samples_per_prompt=samples_per_prompt, on_batch=on_batch
            )
        run = SlotRun(
            model, prompts, settings, slots=slots, eos_id=self.eos_id, pad_id=self.pad_id, seed=seed,
            samples_per_prompt=samples_per_prompt, on_batch=on_batch,
        )  # fmt: skip
        return run.samples()
