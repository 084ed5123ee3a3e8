"""The frontier that no policy can be above: the most score at each KL, by importance weights.

At temperature t the best policy is pi* = pi_ref exp(score / t) / Z, with Z its sum for each prompt. Samples
of the speaker alone never show it where it is far away, so samples of trained policies are added, and each
counts as pi_ref over the density of the mixture (Veach and Guibas 1995, balance heuristic).

Legend: M models that samples are drawn from, the first the speaker; G prompts; N samples of a prompt, over all models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.learns_task import Task, draw
from pipeline_lib.hashing import derive_seed

TEMPERATURES = tuple(10 ** (-place / 8) for place in range(17))
"""From 1 to 0.01 of the score's range."""


def best_possible(
    task: Task, policies: Sequence[PreTrainedModel], *, samples: int, seed: int
) -> list[dict[str, float]]:
    """Estimate score and KL of the best policy at falling temperatures.

    Args:
        task: The task.
        policies: Trained policies that reach where the best ones are.
        samples: Samples of each prompt from each model.
        seed: Of the samples.
    """
    models = [task.speaker(), *policies]
    drawn = [
        draw(task, model, samples=samples, seed=derive_seed(seed, "optimum", place))
        for place, model in enumerate(models)
    ]
    score_GN = torch.cat([one.scores.double().view(-1, samples) for one in drawn], 1)
    logp_MGN = torch.stack(
        [torch.cat([one.logps(model, task).view(-1, samples) for one in drawn], 1) for model in models]
    )
    return [{"temperature": t, **tilted(score_GN, logp_MGN, temperature=t)} for t in TEMPERATURES]


def tilted(score_GN: Tensor, logp_MGN: Tensor, *, temperature: float) -> dict[str, float]:
    """Return score and KL of pi_ref exp(score / temperature) / Z, means over prompts.

    Args:
        score_GN: Score of each sample; as many samples of a prompt from each model.
        logp_MGN: Log-probability of each sample under each model, the reference first.
        temperature: Above 0; the KL's weight.
    """
    num_models = len(logp_MGN)
    mixture_GN = logp_MGN.logsumexp(0) - torch.tensor(float(num_models)).log()
    weight_GN = logp_MGN[0] - mixture_GN
    # Self-normalised, so that the weights of every prompt add up to 1 also where the estimate of their sum does not.
    weight_GN = weight_GN - weight_GN.logsumexp(1, keepdim=True)
    tilted_GN = weight_GN + score_GN / temperature
    log_z_G = tilted_GN.logsumexp(1)
    best_G = (tilted_GN.softmax(1) * score_GN).sum(1)
    return {"score": float(best_G.mean()), "kl_nats": float((best_G / temperature - log_z_G).mean())}
