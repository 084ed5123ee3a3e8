"""What every preference loss must do, over the whole table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.preference.contract import PairLogps

every_loss = pytest.mark.parametrize("name", list(PREFERENCE_LOSSES))


def pairs(num: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PairLogps:
    """Make pairs of responses of 5 to 40 tokens at about 2 nats a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 40, (num,), generator=generator) for _ in range(2)]

    def logps(lengths_B: torch.Tensor) -> torch.Tensor:
        return (-2 * lengths_B + torch.randn(num, generator=generator)).to(dtype)

    return PairLogps(
        chosen_B=logps(tokens[0]), rejected_B=logps(tokens[1]), ref_chosen_B=logps(tokens[0]),
        ref_rejected_B=logps(tokens[1]), chosen_tokens_B=tokens[0], rejected_tokens_B=tokens[1],
    )  # fmt: skip


def rows(batch: PairLogps, chosen: slice) -> PairLogps:
    return PairLogps(**{key: value[chosen] for key, value in vars(batch).items()})


def build(name: str) -> Any:
    return PREFERENCE_LOSSES.build({"name": name})


@every_loss
def test_contract(name: str) -> None:
    loss = build(name)
    assert isinstance(loss, BaseModel)
    assert type(loss).model_config["frozen"] is True
    module = type(loss).__module__.rpartition(".")[2]
    assert name == type(loss).__name__.lower() == module.replace("_", "")
    assert "Source:" in (type(loss).__doc__ or "")
    for field_name, field in type(loss).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"


@every_loss
def test_parameters_are_validated(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key 'no_such'"):
        PREFERENCE_LOSSES.build({"name": name, "no_such": 1})
    for field in PREFERENCE_LOSSES[name].model_fields:
        for bad in ("a text", float("nan"), None):
            with pytest.raises(ConfigError, match=field):
                PREFERENCE_LOSSES.build({"name": name, field: bad})


def test_bounds_of_dpo() -> None:
    bad: list[tuple[str, float]] = [("beta", 0.0), ("beta", -1.0), ("label_smoothing", 0.5), ("label_smoothing", -0.1)]
    for field, value in bad:
        with pytest.raises(ConfigError, match=field):
            PREFERENCE_LOSSES.build({"name": "dpo", field: value})


@every_loss
@pytest.mark.parametrize("num", [1, 4])
def test_one_value_a_pair(name: str, num: int) -> None:
    loss_B = build(name).per_pair(pairs(num))
    assert loss_B.shape == (num,)
    assert loss_B.dtype == torch.float64
    assert torch.isfinite(loss_B).all()


@every_loss
def test_pairs_do_not_mix(name: str) -> None:
    loss, batch = build(name), pairs(4)
    together = loss.per_pair(batch)
    alone = torch.cat([loss.per_pair(rows(batch, slice(k, k + 1))) for k in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    backwards = PairLogps(**{key: value.flip(0) for key, value in vars(batch).items()})
    torch.testing.assert_close(loss.per_pair(backwards), together.flip(0), rtol=1e-12, atol=1e-12)


@every_loss
def test_the_first_step_raises_chosen_and_lowers_rejected(name: str) -> None:
    start = pairs(4)
    same = replace(start, ref_chosen_B=start.chosen_B, ref_rejected_B=start.rejected_B)
    for batch in (same, *(pairs(4, seed=seed) for seed in (1, 2))):
        chosen_B, rejected_B = (values.clone().requires_grad_() for values in (batch.chosen_B, batch.rejected_B))
        loss_B = build(name).per_pair(replace(batch, chosen_B=chosen_B, rejected_B=rejected_B))
        loss_B.sum().backward()
        assert chosen_B.grad is not None
        assert rejected_B.grad is not None
        assert (chosen_B.grad < 0).all()
        assert (rejected_B.grad > 0).all()
        # A step along the gradient lowers the loss of every pair.
        moved = replace(batch, chosen_B=chosen_B - 1e-3 * chosen_B.grad, rejected_B=rejected_B - 1e-3 * rejected_B.grad)
        assert (build(name).per_pair(moved) < loss_B).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_100_000_tokens(name: str, dtype: torch.dtype, sign: int) -> None:
    """A response of 100,000 tokens whose every token moved by 10 nats, either way."""
    base = torch.full((2,), -1.2e6, dtype=dtype)
    chosen_B, rejected_B = (base + way * sign * 1e6 for way in (1, -1))
    chosen_B.requires_grad_()
    rejected_B.requires_grad_()
    count = torch.full((2,), 100_000)
    loss_B = build(name).per_pair(PairLogps(chosen_B, rejected_B, base, base, count, count))
    assert torch.isfinite(loss_B).all()
    loss_B.sum().backward()
    for values in (chosen_B, rejected_B):
        assert values.grad is not None
        assert torch.isfinite(values.grad).all()


@every_loss
def test_gradient_is_the_derivative(name: str) -> None:
    batch = pairs(3)

    def loss(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = build(name).per_pair(replace(batch, chosen_B=chosen_B, rejected_B=rejected_B))
        return value

    inputs = tuple(values.clone().requires_grad_() for values in (batch.chosen_B, batch.rejected_B))
    assert torch.autograd.gradcheck(loss, inputs)


def test_pairs_refuse_shapes_that_would_broadcast() -> None:
    batch = pairs(4)
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        replace(batch, ref_chosen_B=batch.ref_chosen_B[:, None])
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        replace(batch, chosen_tokens_B=batch.chosen_tokens_B[:1])
