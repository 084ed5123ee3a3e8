"""What an iteration on own samples shows of itself before it is trained on: one number a name.

Legend: R responses, N tokens of all responses, flat in rollout order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline_lib.rl.kl import Estimator, kl_estimate
from pipeline_lib.rl.monitor import distinct_frac, duplicates_frac, repeated_frac, slope
from pipeline_lib.rl.rewards import apply_missing_eos
from pipeline_lib.text.bleu import self_bleu
from pipeline_lib.training.group_settings import GroupSettings
from pipeline_lib.training.rollout import Rollouts
from pipeline_lib.training.settings import PpoSettings

REPEATED_TOKENS = 3
"""Tokens of a piece that counts as repeated."""


def iteration_figures(
    iteration: int,
    rollouts: Rollouts,
    settings: PpoSettings | GroupSettings,
    *,
    kl_coef: float,
    kl_estimator: Estimator | Literal["full"] = "k1",
) -> dict[str, float]:
    """Measure the rollouts of an iteration.

    Args:
        iteration: Counted from 0.
        rollouts: With everything the models said of them.
        settings: What happens to responses without an end.
        kl_coef: Weight of the KL in the reward or the loss, in this iteration.
        kl_estimator: The estimate of the KL that it weighs.
    """
    score_R, kl_nats = rollouts.score_R, kl_of_responses(rollouts)
    penalty = -kl_coef * kl_nats[kl_estimator]
    shaped_score = float(shaped_scores(rollouts, settings).mean())
    k1_R = sum_by_response(rollouts, rollouts.logp_N - rollouts.ref_logp_N)
    figures = {
        "iteration": float(iteration),
        "ref_kl_nats": kl_nats["k1"],
        **{f"ref_kl_{name}_nats": value for name, value in kl_nats.items() if name != "k1"},
        "negative_kl_frac": float((k1_R < 0).float().mean()),
        "score": float(score_R.mean()),
        "score_std": float(score_R.std(unbiased=False)),
        "shaped_score": shaped_score,
        "non_score_reward": penalty,
        "rlhf_reward": shaped_score + penalty,
        "entropy_nats": float(rollouts.entropy_N.mean()),
        "response_tokens": sum(rollouts.lengths_R) / len(rollouts.lengths_R),
        "finished_frac": float(rollouts.is_finished_R.float().mean()),
        **_text_figures(rollouts),
    }
    if rollouts.heldout_score_R is not None:
        figures["heldout_score"] = float(rollouts.heldout_score_R.mean())
    if rollouts.mismatch_nats is not None:
        figures["rollout/mismatch_nats"] = float(rollouts.mismatch_nats)
    return figures | {f"reward/{name}": float(part_R.mean()) for name, part_R in rollouts.parts_R.items()}


def shaped_scores(rollouts: Rollouts, settings: PpoSettings | GroupSettings) -> Tensor:
    """Return the scores after the rule for responses that did not end by themselves, `(R,)`."""
    return apply_missing_eos(
        rollouts.score_R, rollouts.is_finished_R, mode=settings.missing_eos, value=settings.missing_eos_value
    )


def kl_of_responses(rollouts: Rollouts) -> dict[str, float]:
    """Return the mean KL of a response from the reference by every estimator, nats."""
    names: tuple[Estimator, ...] = ("k1", "k2", "k3")
    found: dict[str, float] = {
        name: float(sum_by_response(rollouts, kl_estimate(rollouts.logp_N, rollouts.ref_logp_N, estimator=name)).mean())
        for name in names
    }
    if rollouts.full_kl_N is not None:
        found["full"] = float(sum_by_response(rollouts, rollouts.full_kl_N).mean())
    return found


def sum_by_response(rollouts: Rollouts, values_N: Tensor) -> Tensor:
    """Sum a figure of every token over each response, `(R,)`."""
    return torch.stack([row.sum() for row in rollouts.rows(values_N)])


def _text_figures(rollouts: Rollouts) -> dict[str, float]:
    """Measure how much responses say, how much of it twice, and whether the long ones score higher."""
    ids = rollouts.responses
    return {
        "score_per_token": slope(torch.tensor(rollouts.lengths_R), rollouts.score_R),
        "distinct_1_frac": distinct_frac(ids, 1),
        "distinct_2_frac": distinct_frac(ids, 2),
        "repeated_frac": repeated_frac(ids, REPEATED_TOKENS),
        "duplicates_frac": duplicates_frac(ids),
        "self_bleu_frac": self_bleu(ids),
    }
