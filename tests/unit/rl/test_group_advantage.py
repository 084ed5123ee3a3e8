"""Advantages in a group: identities between the forms, and what is refused. Numbers by hand are in tests/golden."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.rl.group_advantage import alike_frac, group_normalized, leave_one_out

REWARDS_GK = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_leave_one_out_is_the_distance_from_the_mean_times_k_over_k_less_one() -> None:
    expected = group_normalized(REWARDS_GK, scale="none") * 6 / 5
    torch.testing.assert_close(leave_one_out(REWARDS_GK), expected, rtol=1e-12, atol=1e-12)


def test_advantages_of_a_group_sum_to_zero_and_do_not_see_a_shift() -> None:
    for found, shifted in (
        (leave_one_out(REWARDS_GK), leave_one_out(REWARDS_GK + 7)),
        (group_normalized(REWARDS_GK, scale="std"), group_normalized(REWARDS_GK + 7, scale="std")),
    ):
        torch.testing.assert_close(found.sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(found, shifted, rtol=0, atol=1e-12)


def test_scaled_advantages_do_not_see_the_rewards_scale() -> None:
    one, other = (group_normalized(REWARDS_GK * factor, scale="std", epsilon=0.0) for factor in (1.0, 100.0))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert float(one.std(1).mean()) == pytest.approx(1.0)


def test_equal_rewards_teach_nothing_and_divide_by_no_zero() -> None:
    assert group_normalized(torch.full((2, 3), 4.0), scale="std").abs().max() == 0
    assert alike_frac(torch.tensor([[1.0, 1.0], [0.0, 1.0]])) == 0.5


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for function in (leave_one_out, alike_frac, lambda values: group_normalized(values, scale="none")):
        with pytest.raises(ValueError, match="2 samples at least"):
            function(torch.zeros(shape))


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        leave_one_out(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="no scale 'half'"):
        group_normalized(REWARDS_GK, scale="half")  # type: ignore[arg-type]
