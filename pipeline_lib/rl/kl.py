"""KL estimates and the controller of the KL weight. Nothing is clamped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
Controller = Literal["adaptive", "schulman", "fixed"]
MAX_RELATIVE_ERROR = 0.2
SCHULMAN_TOLERANCE = 1.5
SCHULMAN_FACTOR = 2.0


def kl_estimate(token_logp: Tensor, ref_token_logp: Tensor, *, estimator: Estimator) -> Tensor:
    """Estimate KL(policy || reference) per token from one sample of the policy.

    With d = logp - ref logp: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    Args:
        token_logp: Under the policy that sampled the tokens.
        ref_token_logp: Under the reference.
        estimator: Which of the three.

    Raises:
        ValueError: The shapes differ, or there is no such estimator.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    if token_logp.shape != ref_token_logp.shape:
        raise ValueError(f"{tuple(token_logp.shape)} and {tuple(ref_token_logp.shape)} must be one shape")
    difference = token_logp - ref_token_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference  # expm1: near 0 the other form goes below 0
    raise ValueError(f"there is no KL estimator {estimator!r}")


def full_kl(logp_TV: Tensor, ref_logp_TV: Tensor) -> Tensor:
    """Return sum_v p (log p - log p_ref) at each position, from log-probabilities over V; 0 log 0 is 0."""
    is_possible_TV = logp_TV > -torch.inf
    log_ratio_TV = torch.where(is_possible_TV, logp_TV - ref_logp_TV, torch.zeros_like(logp_TV))
    return (logp_TV.exp() * log_ratio_TV).sum(-1)


@dataclass(frozen=True)
class KlController:
    """The weight of the KL penalty: fixed, or steered to a target.

    adaptive: e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e * n / horizon, n the responses since
    the last update (Ziegler et al. 2019, section 2.2). schulman: coef * 2 where KL > 1.5 target,
    coef / 2 where KL < target / 1.5 (Schulman et al. 2017, section 4).
    """

    coef: float
    target: float | None
    """Nats a response; None keeps the weight."""
    horizon: float
    kind: Controller = "adaptive"

    def update(self, kl_nats: float, *, num_steps: int) -> KlController:
        """Return the controller after an iteration.

        Args:
            kl_nats: Mean KL of the iteration's responses.
            num_steps: Responses of the iteration.
        """
        if self.target is None or self.kind == "fixed":
            return self
        if self.kind == "schulman":
            if kl_nats > self.target * SCHULMAN_TOLERANCE:
                return self.with_coef(self.coef * SCHULMAN_FACTOR)
            is_low = kl_nats < self.target / SCHULMAN_TOLERANCE
            return self.with_coef(self.coef / SCHULMAN_FACTOR) if is_low else self
        error = min(max(kl_nats / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        return self.with_coef(self.coef * (1 + error * num_steps / self.horizon))

    def with_coef(self, coef: float) -> KlController:
        """Return the controller with another weight."""
        return replace(self, coef=coef)
