"""Ratings out of pairwise wins: the Bradley-Terry model's strengths, P(i beats j) = p_i / (p_i + p_j).

Legend: M models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipeline_lib.evaluation.stats import Array

_MAX_ROUNDS = 100_000


def bradley_terry_strengths(wins_MM: ArrayLike, *, tolerance: float = 1e-12) -> Array:
    """Fit strengths to wins by maximum likelihood.

    p_i <- W_i / sum_j n_ij / (p_i + p_j), W the wins of i and n the comparisons of i with j, until nothing
    moves: each round raises the likelihood, whose maximum is the only one.

    Args:
        wins_MM: At (i, j) how often i won against j; a tie is half a win for both. The diagonal is 0.
        tolerance: Relative movement of every strength at which it ends.

    Returns:
        `(M,)`, positive, with a product of 1: only their ratios mean anything.

    Raises:
        ValueError: The table is not one of wins, or no finite strengths fit it: some models never lost
            to the others, or were never compared with them.

    Source: Bradley and Terry 1952; Hunter 2004, "MM algorithms for generalized Bradley-Terry models", eq. 3.
    """
    wins = np.array(wins_MM, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not np.isfinite(wins).all() or (wins < 0).any():
        raise ValueError(f"wins {wins.shape} must be (M, M), finite and not below 0")
    if wins.diagonal().any():
        raise ValueError("a model cannot win against itself")
    if not _all_reach_all(wins > 0):
        raise ValueError("some models never lost to the others, or were never compared with them")
    played, won = wins + wins.T, wins.sum(1)
    strength: Array = np.ones(len(wins))
    for _ in range(_MAX_ROUNDS):
        following = won / (played / (strength[:, None] + strength[None, :])).sum(1)
        following /= np.exp(np.log(following).mean())
        moved = float(np.abs(following / strength - 1).max())
        strength = following
        if moved <= tolerance:
            return strength
    raise ValueError(f"the strengths still move by {moved:.1e} after {_MAX_ROUNDS} rounds")


def _all_reach_all(beats_MM: np.ndarray) -> bool:
    """Tell whether every model beat every other through some chain of wins (Ford 1957)."""
    reach = beats_MM | np.eye(len(beats_MM), dtype=bool)
    for middle in range(len(reach)):
        reach |= reach[:, middle, None] & reach[None, middle, :]
    return bool(reach.all())
