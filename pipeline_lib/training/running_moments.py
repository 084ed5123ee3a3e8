"""Mean and variance of a stream of numbers, taken in as they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

EPSILON = 1e-8
"""Added to the variance before it divides."""


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared differences from the mean of all numbers so far."""

    count: float = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """Variance divided by n; 0 before the first number."""
        return self.squares / self.count if self.count else 0.0

    def with_values(self, values: Sequence[float]) -> RunningMoments:
        """Return the moments with more numbers, which is as if all had come at once.

        Source: Chan, Golub and LeVeque 1979, the update of two samples' moments.
        """
        if not values:
            return self
        size = len(values)
        mean = math.fsum(values) / size
        squares = math.fsum((value - mean) ** 2 for value in values)
        total = self.count + size
        apart = mean - self.mean
        return RunningMoments(
            total,
            self.mean + apart * size / total,
            self.squares + squares + apart * apart * self.count * size / total,
        )

    def normalized(self, value: float) -> float:
        """Return (value - mean) / sqrt(variance + 1e-8)."""
        return (value - self.mean) / math.sqrt(self.variance + EPSILON)

    def as_list(self) -> list[float]:
        """Return the fields in their order, as JSON holds them."""
        return [self.count, self.mean, self.squares]
