"""What an iteration on own samples shows of itself before it is trained on (methods 2.6): one number a name.

Legend: R responses, N tokens of all responses, flat in rollout order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline_lib.rl.kl import Estimator, kl_estimate
from pipeline_lib.rl.monitor import distinct_frac, duplicates_frac, repeated_frac, slope
from pipeline_lib.rl.rewards import apply_missing_eos
from pipeline_lib.text.bleu import self_bleu
from pipeline_lib.training.rollout import Rollouts
from pipeline_lib.training.settings import PpoSettings

REPEATED_TOKENS = 3
"""Tokens of a piece that counts as repeated."""


def iteration_figures(iteration: int, rollouts: Rollouts, settings: PpoSettings, *, kl_coef: float) -> dict[str, float]:
    """Measure the rollouts of an iteration.

    Args:
        iteration: Counted from 0.
        rollouts: With everything the models said of them.
        settings: The estimator of the penalty, and what happens to responses without an end.
        kl_coef: Weight of the penalty in this iteration.
    """
    score_R, ids = rollouts.score_R, [tree.response_ids[0] for tree in rollouts.trees]
    kl_nats = kl_of_responses(rollouts)
    penalty = -kl_coef * kl_nats[settings.kl_estimator]
    shaped_R = apply_missing_eos(
        score_R, rollouts.is_finished_R, mode=settings.missing_eos, value=settings.missing_eos_value
    )
    k1_R = _of_responses(rollouts, rollouts.logp_N - rollouts.ref_logp_N)
    figures = {
        "iteration": float(iteration),
        "kl_coef": kl_coef,
        "ref_kl_nats": kl_nats["k1"],
        **{f"ref_kl_{name}_nats": value for name, value in kl_nats.items() if name != "k1"},
        "negative_kl_frac": float((k1_R < 0).float().mean()),
        "score": float(score_R.mean()),
        "score_std": float(score_R.std(unbiased=False)),
        "shaped_score": float(shaped_R.mean()),
        "non_score_reward": penalty,
        "rlhf_reward": float(shaped_R.mean()) + penalty,
        "entropy_nats": float(rollouts.entropy_N.mean()),
        "response_tokens": sum(rollouts.lengths_R) / len(ids),
        "finished_frac": float(rollouts.is_finished_R.float().mean()),
        **text_figures(ids, score_R),
    }
    if rollouts.heldout_score_R is not None:
        figures["heldout_score"] = float(rollouts.heldout_score_R.mean())
    if rollouts.mismatch_nats is not None:
        figures["rollout/mismatch_nats"] = float(rollouts.mismatch_nats)
    return figures | {f"reward/{name}": float(part_R.mean()) for name, part_R in rollouts.parts_R.items()}


def text_figures(ids: Sequence[Sequence[int]], score_R: Tensor) -> dict[str, float]:
    """Measure how much responses say, how much of it twice, and whether the long ones score higher.

    Args:
        ids: The tokens of each response.
        score_R: Its score.
    """
    return {
        "score_per_token": slope(torch.tensor([len(response) for response in ids]), score_R),
        "distinct_1_frac": distinct_frac(ids, 1),
        "distinct_2_frac": distinct_frac(ids, 2),
        "repeated_frac": repeated_frac(ids, REPEATED_TOKENS),
        "duplicates_frac": duplicates_frac(ids),
        "self_bleu_frac": self_bleu(ids),
    }


def kl_of_responses(rollouts: Rollouts) -> dict[str, float]:
    """Return the mean KL of a response from the reference by every estimator, nats."""
    names: tuple[Estimator, ...] = ("k1", "k2", "k3")
    found: dict[str, float] = {
        name: float(_of_responses(rollouts, kl_estimate(rollouts.logp_N, rollouts.ref_logp_N, estimator=name)).mean())
        for name in names
    }
    if rollouts.full_kl_N is not None:
        found["full"] = float(_of_responses(rollouts, rollouts.full_kl_N).mean())
    return found


def _of_responses(rollouts: Rollouts, values_N: Tensor) -> Tensor:
    return torch.stack([row.sum() for row in rollouts.rows(values_N)])
