"""A linear layer on the rows of a sampling step: torch's numbers, by the transposes where that is faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline_lib.models.few_rows import FEW, linear


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (FEW, 1), (FEW + 1, 1), (3, 2), (1, 40)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_torchs(shape: tuple[int, int], with_bias: bool) -> None:
    x, weight, bias = draw(*shape, 5), draw(7, 5), draw(7) if with_bias else None
    found, wanted = linear(x, weight, bias), nn.functional.linear(x, weight, bias)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_only_steps_go_by_the_transposes() -> None:
    """Where texts are scored the numbers are those of training to the last bit."""
    x, weight = draw(1, 40, 5).float(), draw(7, 5).float()
    assert torch.equal(linear(x, weight), nn.functional.linear(x, weight))
    assert linear(draw(3, 1, 5), draw(7, 5)).stride(0) == 1


def test_gradients_pass() -> None:
    x, weight, bias = (part.requires_grad_() for part in (draw(3, 1, 5), draw(7, 5), draw(7)))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
