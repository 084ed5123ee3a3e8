"""Bradley-Terry on scores: gradients, extremes, shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline_lib.losses.reward.pairs import accuracy, bradley_terry


def scores(seed: int) -> Tensor:
    return 3 * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("centring", [0.0, 0.01])
@pytest.mark.parametrize("margin", [None, 1.0])
def test_gradient_is_the_derivative(centring: float, margin: float | None) -> None:
    margin_P = None if margin is None else torch.full((5,), margin, dtype=torch.float64)

    def loss(better_P: Tensor, worse_P: Tensor) -> Tensor:
        return bradley_terry(better_P, worse_P, margin_P=margin_P, centring=centring)

    assert torch.autograd.gradcheck(loss, (scores(0).requires_grad_(), scores(1).requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_scores_are_finite(dtype: torch.dtype) -> None:
    better_P = torch.tensor([1e8, -1e8, 0.0], dtype=dtype, requires_grad=True)
    loss_P = bradley_terry(better_P, torch.zeros(3, dtype=dtype))
    loss_P.sum().backward()
    assert loss_P.dtype == dtype
    assert loss_P[0] == 0
    assert loss_P[1] == -better_P.detach()[1]
    assert better_P.grad is not None
    assert better_P.grad.tolist() == [0.0, -1.0, -0.5]


def test_only_the_difference_counts() -> None:
    shifted = bradley_terry(scores(0) + 100, scores(1) + 100)
    torch.testing.assert_close(shifted, bradley_terry(scores(0), scores(1)), rtol=1e-9, atol=1e-12)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        bradley_terry(scores(0), scores(1)[:, None])
    with pytest.raises(ValueError, match="must have one shape"):
        bradley_terry(scores(0), scores(1), margin_P=scores(2)[:, None])
    with pytest.raises(ValueError, match="must have one shape"):
        accuracy(scores(0), scores(1)[:1])
    with pytest.raises(ValueError, match="there is no pair"):
        accuracy(scores(0)[:0], scores(1)[:0])
