"""What every preference loss must do, over the whole table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.preference.contract import PairLogps, RankedLogps, UnpairedLogps

FORMS = {name: PREFERENCE_LOSSES[name].form for name in PREFERENCE_LOSSES}  # type: ignore[attr-defined]
LOWERS_CHOSEN = {"apo_down"}
every_loss = pytest.mark.parametrize("name", list(PREFERENCE_LOSSES))


def of_form(form: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, own in FORMS.items() if own == form])


def pairs(num: int, *, seed: int = 0) -> PairLogps:
    """Make pairs of responses of 5 to 40 tokens at about 2 nats a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 40, (num,), generator=generator) for _ in range(2)]

    def logps(lengths_B: Tensor) -> Tensor:
        return (-2 * lengths_B + torch.randn(num, generator=generator)).to(torch.float64)

    return PairLogps(
        chosen_B=logps(tokens[0]), rejected_B=logps(tokens[1]), ref_chosen_B=logps(tokens[0]),
        ref_rejected_B=logps(tokens[1]), chosen_tokens_B=tokens[0], rejected_tokens_B=tokens[1],
    )  # fmt: skip


def ranked(ranks: list[int], *, seed: int = 0) -> RankedLogps:
    """Make the responses of one prompt; rewards are the ranks' negatives, halved."""
    generator = torch.Generator().manual_seed(seed)
    tokens_K = torch.randint(5, 40, (len(ranks),), generator=generator)
    logps = [
        (-2 * tokens_K + torch.randn(len(ranks), generator=generator)).to(torch.float64)
        for _ in ("policy", "reference")
    ]
    return RankedLogps(logps[0], logps[1], tokens_K, torch.tensor(ranks), -torch.tensor(ranks, dtype=torch.float64) / 2)


def unpaired(num: int, *, seed: int = 0) -> UnpairedLogps:
    """Make responses of which every other is desirable, and 3 mismatched ones."""
    batch = pairs(num, seed=seed)
    kl_M = torch.tensor([0.7, -0.2, 1.3], dtype=torch.float64)
    return UnpairedLogps(
        logp_B=batch.chosen_B, ref_logp_B=batch.ref_chosen_B, is_desirable_B=torch.arange(num) % 2 == 0,
        kl_logp_M=kl_M - 40, kl_ref_logp_M=torch.full((3,), -40.0, dtype=torch.float64), tokens_B=batch.chosen_tokens_B,
    )  # fmt: skip


def rows(batch: Any, chosen: slice) -> Any:
    changed = {
        key: value[chosen] for key, value in vars(batch).items() if value is not None and not key.startswith("kl_")
    }
    return replace(batch, **changed)


def build(name: str, **parameters: Any) -> Any:
    return PREFERENCE_LOSSES.build({"name": name, **parameters})


def case_of(name: str) -> tuple[Any, tuple[str, ...], Callable[[Any, Any], Tensor]]:
    """Return an input of a loss's form, the names of what carries gradient, and how to call it."""
    match FORMS[name]:
        case "pair":
            return pairs(3), ("chosen_B", "rejected_B"), lambda loss, batch: loss.per_pair(batch)
        case "list":
            return ranked([2, 1, 4, 3]), ("logp_K",), lambda loss, batch: loss.of_list(batch)
        case _:
            return unpaired(4), ("logp_B",), lambda loss, batch: loss.per_response(batch)


@every_loss
def test_contract(name: str) -> None:
    loss = build(name)
    assert isinstance(loss, BaseModel)
    assert type(loss).model_config["frozen"] is True
    module = type(loss).__module__.rpartition(".")[2]
    assert name == module
    assert name.replace("_", "") == type(loss).__name__.lower()
    assert "Source:" in (type(loss).__doc__ or "")
    for field_name, field in type(loss).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
    assert loss.form in ("pair", "list", "unpaired")
    assert isinstance(loss.needs_reference, bool)
    assert isinstance(loss.needs_target_kl, bool)


@every_loss
def test_parameters_are_validated(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key 'no_such'"):
        build(name, no_such=1)
    for field in PREFERENCE_LOSSES[name].model_fields:
        for bad in ("a text", float("nan"), None):
            with pytest.raises(ConfigError, match=field):
                build(name, **{field: bad})


BOUNDS = [
    ("dpo", "beta", 0.0), ("dpo", "beta", -1.0), ("dpo", "label_smoothing", 0.5), ("dpo", "label_smoothing", -0.1),
    ("dpo", "sft_coef", -0.1), ("robust", "label_smoothing", 0.5), ("ipo", "tau", 0.0), ("ipo", "reduction", "median"),
    ("exo", "label_smoothing", 0.0), ("slic", "kind", "best"), ("slic", "reg", "l2"), ("orpo", "lam", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field", "value"), BOUNDS)
def test_bounds(name: str, field: str, value: float | str) -> None:
    with pytest.raises(ConfigError, match=field):
        build(name, **{field: value})


@of_form("pair")
@pytest.mark.parametrize("num", [1, 4])
def test_one_value_a_pair(name: str, num: int) -> None:
    loss_B = build(name).per_pair(pairs(num))
    assert loss_B.shape == (num,)
    assert loss_B.dtype == torch.float64
    assert torch.isfinite(loss_B).all()


@of_form("list")
@pytest.mark.parametrize("ranks", [[1, 2], [3, 1, 2], [1, 1, 2, 2], [1, 1]])
def test_one_value_a_list(name: str, ranks: list[int]) -> None:
    loss = build(name).of_list(ranked(ranks))
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert torch.isfinite(loss)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_format_is_kept(name: str, dtype: torch.dtype) -> None:
    batch, _, call = case_of(name)
    narrow = replace(
        batch, **{k: v.to(dtype) for k, v in vars(batch).items() if v is not None and v.is_floating_point()}
    )
    assert call(build(name), narrow).dtype == dtype


@of_form("pair")
def test_pairs_do_not_mix(name: str) -> None:
    loss, batch = build(name), pairs(4)
    together = loss.per_pair(batch)
    alone = torch.cat([loss.per_pair(rows(batch, slice(k, k + 1))) for k in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    turned = replace(batch, **{key: value.flip(0) for key, value in vars(batch).items() if value is not None})
    torch.testing.assert_close(loss.per_pair(turned), together.flip(0), rtol=1e-12, atol=1e-12)


@of_form("unpaired")
def test_responses_do_not_mix(name: str) -> None:
    loss, batch = build(name), unpaired(4)
    alone = torch.cat([loss.per_response(rows(batch, slice(k, k + 1))) for k in range(4)])
    torch.testing.assert_close(loss.per_response(batch), alone, rtol=1e-12, atol=1e-12)


@of_form("pair")
def test_the_first_step_raises_chosen_and_lowers_rejected(name: str) -> None:
    start = pairs(4)
    batch = replace(start, ref_chosen_B=start.chosen_B, ref_rejected_B=start.rejected_B)
    chosen_B, rejected_B = (values.clone().requires_grad_() for values in (batch.chosen_B, batch.rejected_B))
    loss_B = build(name).per_pair(replace(batch, chosen_B=chosen_B, rejected_B=rejected_B))
    loss_B.sum().backward()
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    if name not in LOWERS_CHOSEN:
        assert (chosen_B.grad < 0).all()
    assert (rejected_B.grad > 0).all()
    # A step along the gradient lowers the loss of every pair.
    moved = replace(batch, chosen_B=chosen_B - 1e-3 * chosen_B.grad, rejected_B=rejected_B - 1e-3 * rejected_B.grad)
    assert (build(name).per_pair(moved) < loss_B).all()


@of_form("list")
def test_the_first_step_raises_the_best_above_the_worst(name: str) -> None:
    start = ranked([2, 1, 4, 3])
    logp_K = torch.tensor([-41.0, -42.0, -39.0, -40.0], dtype=torch.float64, requires_grad=True)
    batch = replace(start, logp_K=logp_K, ref_logp_K=logp_K.detach(), tokens_K=torch.full((4,), 20))
    build(name).of_list(batch).backward()
    assert logp_K.grad is not None
    assert logp_K.grad[1] < 0
    assert logp_K.grad[1] < logp_K.grad[2]


@of_form("unpaired")
def test_the_first_step_raises_desirable_and_lowers_undesirable_responses(name: str) -> None:
    batch = unpaired(4)
    logp_B = batch.ref_logp_B.clone().requires_grad_()
    build(name).per_response(replace(batch, logp_B=logp_B)).sum().backward()
    assert logp_B.grad is not None
    assert ((logp_B.grad < 0) == batch.is_desirable_B).all()


@of_form("list")
@pytest.mark.parametrize("ranks", [[2, 1, 4, 3], [1, 2, 2, 3], [2, 1, 1, 3], [1, 1, 1]])
def test_the_order_of_a_list_does_not_matter(name: str, ranks: list[int]) -> None:
    loss, batch = build(name), ranked(ranks)
    shuffled = rows(batch, torch.randperm(len(ranks), generator=torch.Generator().manual_seed(1)))  # type: ignore[arg-type]
    torch.testing.assert_close(loss.of_list(shuffled), loss.of_list(batch), rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_100_000_tokens(name: str, dtype: torch.dtype, sign: int) -> None:
    """Responses of 100,000 tokens whose every token moved by 10 nats, either way."""
    batch, learned, call = case_of(name)
    shape = getattr(batch, learned[0]).shape
    base = torch.full(shape, -1.2e6, dtype=dtype)
    moves = (1e6 * sign * torch.linspace(1, -1, shape[0], dtype=dtype), -1e6 * sign * torch.ones(shape, dtype=dtype))
    values = [(base + move).requires_grad_() for move in moves[: len(learned)]]
    fixed = {
        key: torch.full_like(value, 100_000) if "tokens" in key else value if not value.is_floating_point() else base
        for key, value in vars(batch).items()
        if value is not None and not key.startswith("kl_") and key != "reward_K"
    }
    loss = call(build(name), replace(batch, **{**fixed, **dict(zip(learned, values, strict=True))}))
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    for value in values:
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


@every_loss
def test_gradient_is_the_derivative(name: str) -> None:
    batch, learned, call = case_of(name)

    def loss(*values: Tensor) -> Tensor:
        return call(build(name), replace(batch, **dict(zip(learned, values, strict=True))))

    assert torch.autograd.gradcheck(loss, tuple(getattr(batch, part).clone().requires_grad_() for part in learned))


@every_loss
def test_the_sft_term_is_the_mean_nll_a_token(name: str) -> None:
    batch, _, call = case_of(name)
    if "sft_coef" not in PREFERENCE_LOSSES[name].model_fields:
        assert name in {"orpo", "cpo", "slic", "rrhf", "pro"}, "only losses with a term of their own have no sft_coef"
        return
    added = call(build(name, sft_coef=0.3), batch) - call(build(name), batch)
    nll = {
        "pair": lambda: -batch.chosen_B / batch.chosen_tokens_B,
        "list": lambda: -batch.logp_K[1] / batch.tokens_K[1],
        "unpaired": lambda: -batch.logp_B / batch.tokens_B * batch.is_desirable_B,
    }[FORMS[name]]()
    torch.testing.assert_close(added, 0.3 * nll, rtol=1e-12, atol=1e-12)


def test_inputs_refuse_shapes_that_would_broadcast() -> None:
    batch = pairs(4)
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        replace(batch, ref_chosen_B=batch.ref_chosen_B[:, None])
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        replace(batch, chosen_tokens_B=batch.chosen_tokens_B[:1])
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        replace(batch, chosen_kl_B=torch.zeros(1))
    several = ranked([1, 2, 3])
    with pytest.raises(ValueError, match=r"must be \(K,\)"):
        replace(several, reward_K=several.reward_K[:2])
    with pytest.raises(ValueError, match="must be a scalar"):
        replace(several, target_kl=torch.zeros(3))
    with pytest.raises(ValueError, match="K >= 2"):
        ranked([1])
    single = unpaired(4)
    with pytest.raises(ValueError, match=r"must be \(B,\)"):
        replace(single, is_desirable_B=single.is_desirable_B[:2])
    with pytest.raises(ValueError, match=r"must be \(M,\)"):
        replace(single, kl_logp_M=single.kl_logp_M[:2])
    with pytest.raises(ValueError, match="must be bool"):
        replace(single, is_desirable_B=single.is_desirable_B.long())
    with pytest.raises(ValueError, match="needs tokens_B"):
        build("kto", sft_coef=1.0).per_response(replace(single, tokens_B=None))
