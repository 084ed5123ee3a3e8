"""Best-of-n: what the best of n samples would score, how far it is from the policy, and pass@k.

Everything is estimated from N samples a prompt that were drawn once, for every n <= N. Products of
ratios below 1 stand for the binomial coefficients, so no N is too large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_best(scores: Sequence[float], *, n: int) -> float:
    """Estimate the expected highest score of n fresh samples, without bias.

    sum_i C(i-1, n-1) / C(N, n) x_(i), where x_(1) <= ... <= x_(N): of the C(N, n) subsets of size
    n, C(i-1, n-1) have x_(i) as their best.

    Args:
        scores: Scores of N samples of one prompt, in any order.
        n: Samples that one would choose from, 1 to N.

    Raises:
        ValueError: n is not between 1 and the number of scores, or a score is not finite.

    Source: Nakano et al. 2021, WebGPT (arXiv 2112.09332), appendix I; Hilton and Gao 2022.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"best of n = {n} needs 1 <= n <= {len(scores)} scores")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("a score is not finite, so there is no best one")
    ordered = sorted(scores)
    weight = n / len(ordered)  # C(N-1, n-1) / C(N, n): the share of subsets that hold the highest
    terms = []
    for place in range(len(ordered), n - 1, -1):
        terms.append(weight * ordered[place - 1])
        if place > 1:
            weight *= (place - n) / (place - 1)
    return math.fsum(terms)


def kl_nats(n: int) -> float:
    """Return the KL from the best-of-n policy to the one that is sampled from: log n - (n - 1) / n.

    Exact where no two samples score alike; with ties it is an upper bound.

    Raises:
        ValueError: n is below 1.

    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3; the bound: Beirami et al. 2024
    (arXiv 2401.01879).
    """
    if n < 1:
        raise ValueError(f"best of n = {n} needs n >= 1")
    return math.log(n) - (n - 1) / n


def pass_at_k(num_samples: int, num_correct: int, *, k: int) -> float:
    """Estimate the probability that at least one of k fresh samples is correct, without bias.

    1 - C(N - c, k) / C(N, k).

    Args:
        num_samples: N, samples that were drawn.
        num_correct: c, how many of them are correct.
        k: Samples that one would be allowed, 1 to N.

    Raises:
        ValueError: The counts do not fit.

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be correct")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples} samples")
    all_wrong = 1.0
    for place in range(num_samples - num_correct + 1, num_samples + 1):
        all_wrong *= max(0.0, 1.0 - k / place)
    return 1.0 - all_wrong
