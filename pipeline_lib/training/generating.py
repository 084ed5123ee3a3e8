"""Between training and generators: the policy as a generator takes it, and how far the two are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline_lib.errors import GeneratorError
from pipeline_lib.generation.contract import Policy
from pipeline_lib.models.sampling import Sample
from pipeline_lib.training.trained_model import TrainedModel

MAX_MISMATCH_NATS = 1.0
"""Mean difference a token above which sampler and trainer are not one model: rounding makes a hundredth of it."""


@dataclass
class EveryEighth:
    """Says when progress is worth a line: a generator tells of every prompt that is done."""

    total: int
    _told: int = -1

    def is_due(self, done: int) -> bool:
        """Tell whether another eighth is done, or all."""
        eighth = 8 * done // self.total
        is_new = eighth > self._told
        self._told = max(eighth, self._told)
        return is_new


def policy_for(trained: TrainedModel) -> Policy:
    """Return a model under training as generators take it."""
    return Policy(
        trained.directory, lambda: trained.model, trained.adapter, adapter_name=trained.adapter_name, is_trained=True
    )


def mismatch_nats(samples: Sequence[Sample], logps: Sequence[Tensor]) -> Tensor | None:
    """Return the mean |log-probability of the sampler - of the trainer| a token, float64; None where one is silent.

    The sampler's numbers are used for nothing else: ratios are of the trainer's own log-probabilities.

    Args:
        samples: As they were sampled.
        logps: The trainer's, `(tokens,)` each; of the first tokens where a response was cut.

    Raises:
        GeneratorError: They are so far apart that the sampler has other weights.
    """
    apart = []
    for sample, logp_T in zip(samples, logps, strict=True):
        if sample.logps is None:
            return None
        said_T = torch.tensor(sample.logps[: len(logp_T)], dtype=torch.float64)
        apart.append((said_T - logp_T.double().cpu()).abs())
    mean = torch.cat(apart).mean()
    if not float(mean) <= MAX_MISMATCH_NATS:
        raise GeneratorError(
            f"the generator's log-probabilities are {float(mean):.2f} nats a token from those of the policy",
            next_step="let the server serve the model that training starts from, with --logprobs-mode "
            "processed_logprobs, and let it read the folder generator.exchange",
        )
    return mean
