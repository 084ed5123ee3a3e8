"""Losses on pairs against loops over plain numbers, in float64, values and gradients.

Nothing here calls a tensor function: every expected value is `math` on floats, every expected
gradient a central difference of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.preference.contract import PairLogps


@dataclass
class Pair:
    """One pair as plain numbers."""

    lw: float
    ll: float
    rw: float
    rl: float
    nw: int
    nl: int

    @property
    def h(self) -> float:
        """The margin of log-ratios."""
        return (self.lw - self.rw) - (self.ll - self.rl)

    @property
    def cw(self) -> float:
        return self.lw - self.rw

    @property
    def cl(self) -> float:
        return self.ll - self.rl

    @property
    def nll(self) -> float:
        return -self.lw / self.nw


def s(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def log_odds(mean_logp: float) -> float:
    return mean_logp - math.log(1 - math.exp(mean_logp))


Formula = Callable[[Pair], float]
CASES: list[tuple[dict[str, Any], Formula]] = [
    ({"name": "dpo", "beta": 0.3}, lambda p: -log_s(0.3 * p.h)),
    (
        {"name": "dpo", "beta": 0.3, "label_smoothing": 0.2},
        lambda p: -0.8 * log_s(0.3 * p.h) - 0.2 * log_s(-0.3 * p.h),
    ),
    (
        {"name": "robust", "beta": 0.3, "label_smoothing": 0.2},
        lambda p: (-0.8 * log_s(0.3 * p.h) + 0.2 * log_s(-0.3 * p.h)) / 0.6,
    ),
    ({"name": "ipo", "tau": 0.4}, lambda p: (p.h - 1 / 0.8) ** 2),
    ({"name": "ipo", "tau": 0.4, "reduction": "mean"}, lambda p: (p.cw / p.nw - p.cl / p.nl - 1 / 0.8) ** 2),
    ({"name": "hinge", "beta": 0.3}, lambda p: max(0.0, 1 - 0.3 * p.h)),
    ({"name": "length_normalized", "beta": 2.0}, lambda p: -log_s(2 * (p.cw / p.nw - p.cl / p.nl))),
    ({"name": "r_dpo", "beta": 0.3, "alpha": 0.05}, lambda p: -log_s(0.3 * p.h - 0.05 * (p.nw - p.nl))),
    ({"name": "odpo", "beta": 0.3, "offset": 0.7}, lambda p: -log_s(0.3 * p.h - 0.7)),
    ({"name": "simpo", "beta": 2.0, "gamma": 0.6}, lambda p: -log_s(2 * (p.lw / p.nw - p.ll / p.nl) - 0.6)),
    (
        {"name": "orpo", "lam": 0.25},
        lambda p: p.nll - 0.25 * log_s(log_odds(p.lw / p.nw) - log_odds(p.ll / p.nl)),
    ),
    ({"name": "cpo", "beta": 0.3, "nll_coef": 0.0}, lambda p: -log_s(0.3 * (p.lw - p.ll))),
    ({"name": "cpo", "beta": 0.3}, lambda p: -log_s(0.3 * (p.lw - p.ll)) + p.nll),
    (
        {"name": "exo", "beta": 0.3, "label_smoothing": 0.01},
        lambda p: (
            s(0.3 * p.h) * (log_s(0.3 * p.h) - math.log(0.99)) + s(-0.3 * p.h) * (log_s(-0.3 * p.h) - math.log(0.01))
        ),
    ),
    (
        {"name": "nca", "beta": 0.3},
        lambda p: -log_s(0.3 * p.cw) - 0.5 * log_s(-0.3 * p.cw) - 0.5 * log_s(-0.3 * p.cl),
    ),
    ({"name": "sppo", "beta": 0.3}, lambda p: (p.cw - 1 / 0.6) ** 2 + (p.cl + 1 / 0.6) ** 2),
    ({"name": "apo_zero", "beta": 0.3}, lambda p: 1 - s(0.3 * p.cw) + s(0.3 * p.cl)),
    ({"name": "apo_down", "beta": 0.3}, lambda p: s(0.3 * p.cw) + 1 - s(0.3 * p.h)),
    ({"name": "dpo", "beta": 0.3, "sft_coef": 0.5}, lambda p: -log_s(0.3 * p.h) + 0.5 * p.nll),
    ({"name": "slic", "kind": "rank", "delta": 2.0, "lam": 0.5}, lambda p: max(0.0, 2 - p.lw + p.ll) - 0.5 * p.lw),
    ({"name": "slic", "kind": "rank", "delta": 2.0, "reg": "none"}, lambda p: max(0.0, 2 - p.lw + p.ll)),
]


def drawn(num: int, seed: int) -> list[Pair]:
    """Pairs of all kinds: near each other, far apart, of one token, as long as a page."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(num):
        nw, nl = (draw.choice([1, 2, 7, 40, 300]) for _ in range(2))
        lw, ll = (-draw.uniform(0.05, 3.0) * n for n in (nw, nl))
        spread = draw.choice([0.1, 1.0, 8.0])
        pairs.append(Pair(lw, ll, lw + draw.gauss(0, spread), ll + draw.gauss(0, spread), nw, nl))
    return pairs


def tensors(pairs: list[Pair]) -> PairLogps:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64)

    chosen, rejected = column("lw").requires_grad_(), column("ll").requires_grad_()
    counts = [torch.tensor([getattr(pair, name) for pair in pairs]) for name in ("nw", "nl")]
    return PairLogps(chosen, rejected, column("rw"), column("rl"), *counts)


def slope(formula: Formula, pair: Pair, name: str, *, step: float = 1e-5) -> float:
    values = {field.name: getattr(pair, field.name) for field in fields(pair)}
    up, down = (Pair(**{**values, name: values[name] + sign * step}) for sign in (1, -1))
    return (formula(up) - formula(down)) / (2 * step)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("spec", "formula"), CASES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_value_and_gradient(spec: dict[str, Any], formula: Formula, seed: int) -> None:
    pairs = drawn(24, seed)
    given = tensors(pairs)
    found_B = PREFERENCE_LOSSES.build(spec).per_pair(given)
    assert found_B.dtype == torch.float64
    assert found_B.tolist() == pytest.approx([formula(pair) for pair in pairs], rel=1e-9, abs=1e-12)
    found_B.sum().backward()
    for name, values in (("lw", given.chosen_B), ("ll", given.rejected_B)):
        assert values.grad is not None
        expected = [slope(formula, pair, name) for pair in pairs]
        assert values.grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_every_loss_on_pairs_has_a_formula_here() -> None:
    written = {spec["name"] for spec, _ in CASES}
    assert {name for name in PREFERENCE_LOSSES if PREFERENCE_LOSSES[name].form == "pair"} <= written  # type: ignore[attr-defined]


@pytest.mark.parametrize(("spec", "formula"), CASES, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_nothing_overflows_and_inputs_stay(spec: dict[str, Any], formula: Formula) -> None:
    far = [Pair(-2000.0, -10.0, -10.0, -2000.0, 300, 2), Pair(-10.0, -2000.0, -2000.0, -10.0, 2, 300)]
    given = tensors(far)
    before = [value.detach().clone() for value in vars(given).values() if value is not None]
    loss_B = PREFERENCE_LOSSES.build(spec).per_pair(given)
    loss_B.sum().backward()
    assert bool(torch.isfinite(loss_B).all())
    for values in (given.chosen_B, given.rejected_B):
        assert values.grad is not None
        assert bool(torch.isfinite(values.grad).all())
    after = [value.detach() for value in vars(given).values() if value is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_one_pair_alone_has_the_loss_it_has_in_a_batch() -> None:
    pairs = drawn(6, 9)
    for spec, _ in CASES:
        loss = PREFERENCE_LOSSES.build(spec)
        together = loss.per_pair(tensors(pairs)).tolist()
        alone = [float(loss.per_pair(tensors([pair])).item()) for pair in pairs]
        assert together == pytest.approx(alone, rel=1e-14)


def test_an_nll_that_is_given_is_the_one_that_is_taken() -> None:
    """ORPO and CPO on rows whose cross-entropy counts the prompt too."""
    pairs = drawn(5, 3)
    base = tensors(pairs)
    nll_B = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
    given = PairLogps(**{**vars(base), "chosen_nll_B": nll_B})
    for spec, coef in (({"name": "orpo"}, 1.0), ({"name": "cpo"}, 1.0), ({"name": "simpo", "sft_coef": 2.0}, 2.0)):
        loss = PREFERENCE_LOSSES.build(spec)
        apart_B = loss.per_pair(given) - loss.per_pair(base)
        expected = [coef * (nll - pair.nll) for nll, pair in zip(nll_B.tolist(), pairs, strict=True)]
        assert apart_B.tolist() == pytest.approx(expected, rel=1e-9)


def test_defaults_are_the_published_ones() -> None:
    """Methods 2.5: beta 0.1; SimPO's gamma is the margin itself; e below 1/2."""
    for name in ("dpo", "robust", "hinge", "r_dpo", "odpo", "exo", "nca", "sppo", "apo_zero", "apo_down", "cpo"):
        assert PREFERENCE_LOSSES.build({"name": name}).beta == 0.1
    assert PREFERENCE_LOSSES.build({"name": "dpo"}).label_smoothing == 0.0
    assert PREFERENCE_LOSSES.build({"name": "kto"}).beta == 0.1
    assert PREFERENCE_LOSSES.build({"name": "pro"}).sft_weight == 0.05
    assert PREFERENCE_LOSSES.build({"name": "rrhf"}).rank_coef == 1.0


def test_a_policy_that_is_its_reference_has_the_loss_ln_2() -> None:
    pairs = [Pair(-9.0, -4.0, -9.0, -4.0, 7, 3)]
    for spec in ({"name": "dpo"}, {"name": "dpo", "label_smoothing": 0.3}, {"name": "length_normalized"}):
        loss = PREFERENCE_LOSSES.build(spec).per_pair(tensors(pairs))
        assert float(loss.item()) == pytest.approx(math.log(2), rel=1e-15)
