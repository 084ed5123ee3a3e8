"""What a policy's samples show of its health: spread, repetition, length, how well values foretell returns.

Token ids in, figures out. Legend: R responses, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def distinct_frac(responses: Sequence[Sequence[int]], n: int) -> float:
    """Return the different n-grams over all n-grams of some responses; 1 where there is none.

    No n-gram goes from one response into the next.

    Args:
        responses: Token ids.
        n: Tokens of a piece.

    Source: Li et al. 2016 (arXiv 1510.03055), distinct-1 and distinct-2, on tokens.
    """
    pieces = [piece for ids in responses for piece in _pieces(ids, n)]
    return len(set(pieces)) / len(pieces) if pieces else 1.0


def repeated_frac(responses: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of a response's n-grams that it has said before, the mean over responses.

    A response that goes round in a loop comes near 1, whatever the others say; one without an n-gram is 0.

    Args:
        responses: Token ids, at least one response.
        n: Tokens of a piece.
    """
    shares = [1.0 - distinct_frac([ids], n) for ids in responses]
    return sum(shares) / len(shares)


def duplicates_frac(responses: Sequence[Sequence[int]]) -> float:
    """Return the share of responses that are the same as an earlier one; at least one response."""
    return 1.0 - len({tuple(ids) for ids in responses}) / len(responses)


def slope(x_R: Tensor, y_R: Tensor) -> float:
    """Return the least-squares slope of y over x; 0 where x does not vary.

    Of the score over the length it tells how much a further token pays, whatever it says.

    Args:
        x_R: E.g. tokens of each response.
        y_R: E.g. its score.

    Raises:
        ValueError: The shapes differ.
    """
    if x_R.shape != y_R.shape:
        raise ValueError(f"{tuple(x_R.shape)} and {tuple(y_R.shape)} must be one shape")
    apart_R = x_R.double() - x_R.double().mean()
    spread = float(apart_R.square().sum())
    return float((apart_R * (y_R.double() - y_R.double().mean())).sum()) / spread if spread > 0 else 0.0


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns); 0 where the returns do not vary.

    1 is a perfect value function, 0 one that says as much as a constant, below 0 one that misleads.

    Args:
        values_N: The value function before each token.
        returns_N: What it should have said.

    Raises:
        ValueError: The shapes differ.
    """
    if values_N.shape != returns_N.shape:
        raise ValueError(f"{tuple(values_N.shape)} and {tuple(returns_N.shape)} must be one shape")
    variance = float(returns_N.double().var(unbiased=False))
    missed = float((returns_N.double() - values_N.double()).var(unbiased=False))
    return 1.0 - missed / variance if variance > 0 else 0.0


def truncated_length(ids: Sequence[int], token: int, *, after: int) -> int | None:
    """Return how many tokens a response has up to and with its first such token at or past a place.

    Args:
        ids: The response.
        token: What ends it.
        after: Places before this one, counted from 0, do not end it.

    Returns:
        None where the token does not come.

    Source: `truncate_token` and `truncate_after` of openai/lm-human-preferences, `train_policy.py`.
    """
    for place in range(after, len(ids)):
        if ids[place] == token:
            return place + 1
    return None


def _pieces(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
