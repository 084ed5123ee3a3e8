"""Losses on lists and single responses against loops over plain numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.preference.contract import RankedLogps, UnpairedLogps


@dataclass
class Ranked:
    """The responses of one prompt as plain numbers."""

    lp: list[float]
    ref: list[float]
    tokens: list[int]
    rank: list[int]
    reward: list[float]

    @property
    def p(self) -> list[float]:
        """Mean log-probability a token."""
        return [lp / n for lp, n in zip(self.lp, self.tokens, strict=True)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse), ties left out."""
        places = range(len(self.lp))
        return [(i, j) for i in places for j in places if self.rank[i] < self.rank[j]]

    @property
    def best(self) -> list[int]:
        return [i for i, rank in enumerate(self.rank) if rank == min(self.rank)]


def plackett_luce(x: Ranked) -> float:
    """-sum_k [s_k - log sum over j at k or later exp s_j], by sorting: only for lists without ties."""
    s = [0.3 * (lp - ref) for lp, ref in zip(x.lp, x.ref, strict=True)]
    order = sorted(range(len(s)), key=lambda i: x.rank[i])
    return -sum(s[i] - math.log(sum(math.exp(s[j]) for j in order[k:])) for k, i in enumerate(order))


def rrhf(x: Ranked) -> float:
    ranking = sum(max(0.0, x.p[worse] - x.p[better]) for better, worse in x.pairs)
    return 2 * ranking - sum(x.lp[i] for i in x.best) / len(x.best)


def pro(x: Ranked) -> float:
    """As printed, the division by temperatures included; rewards differ from each other."""
    order = sorted(range(len(x.lp)), key=lambda i: -x.reward[i])
    s, r = [x.p[i] for i in order], [x.reward[i] for i in order]
    count, total = len(s), 0.0
    for k in range(count - 1):
        t = {i: 1 / (r[k] - r[i]) for i in range(k + 1, count)}
        own = math.exp(s[k] / min(t.values()))
        total -= math.log(own / (own + sum(math.exp(s[i] / t[i]) for i in t)))
    return total - 0.05 * (count - 1) ** 2 * x.lp[order[0]]


def slic(kind: str) -> Callable[[Ranked], float]:
    def formula(x: Ranked) -> float:
        place = [sum(other < rank for other in x.rank) for rank in x.rank]
        match kind:
            case "rank":
                terms = [max(0.0, 1.5 - x.lp[i] + x.lp[j]) for i, j in x.pairs]
                calibration = sum(terms) / len(terms)
            case "margin":
                terms = [max(0.0, 1.5 * (x.reward[i] - x.reward[j]) - x.lp[i] + x.lp[j]) for i, j in x.pairs]
                calibration = sum(terms) / len(terms)
            case "list":
                calibration = sum(
                    max(0.0, 1.5 * abs(place[i] - place[j]) - x.lp[i] + x.lp[j]) for i, j in x.pairs
                )  # fmt: skip
            case _:
                highest = max(x.lp)
                share = [math.exp(lp - highest) for lp in x.lp]
                calibration = -sum(r * e / sum(share) for r, e in zip(x.reward, share, strict=True))
        return calibration - 0.5 * sum(x.lp[i] for i in x.best) / len(x.best)

    return formula


CASES: list[tuple[dict[str, Any], Callable[[Ranked], float]]] = [
    ({"name": "plackett_luce", "beta": 0.3}, plackett_luce),
    ({"name": "rrhf", "rank_coef": 2.0}, rrhf),
    ({"name": "pro"}, pro),
    *(
        ({"name": "slic", "kind": kind, "delta": 1.5, "lam": 0.5}, slic(kind))
        for kind in ("rank", "margin", "list", "reward")
    ),
]
TAKES_TIES = {"rrhf", "slic"}
every_case = pytest.mark.parametrize(
    ("spec", "formula"), CASES, ids=[f"{spec['name']}-{spec.get('kind', '')}" for spec, _ in CASES]
)


def drawn(count: int, seed: int, *, has_ties: bool) -> Ranked:
    draw = random.Random(seed)
    tokens = [draw.choice([1, 3, 20]) for _ in range(count)]
    lp = [-draw.uniform(0.2, 2.0) * n for n in tokens]
    rank = [draw.randint(1, 3) for _ in range(count)] if has_ties else draw.sample(range(1, count + 1), count)
    if len(set(rank)) == 1:
        rank[0] = 4
    reward = [-rank[i] + (0.0 if has_ties else draw.uniform(-0.4, 0.4)) for i in range(count)]
    return Ranked(lp, [x + draw.gauss(0, 2) for x in lp], tokens, rank, reward)


def tensors(x: Ranked) -> RankedLogps:
    return RankedLogps(
        torch.tensor(x.lp, dtype=torch.float64, requires_grad=True), torch.tensor(x.ref, dtype=torch.float64),
        torch.tensor(x.tokens), torch.tensor(x.rank), torch.tensor(x.reward, dtype=torch.float64),
    )  # fmt: skip


def slopes(formula: Callable[[Ranked], float], x: Ranked, *, step: float = 1e-5) -> list[float]:
    found = []
    for place in range(len(x.lp)):
        up, down = (
            replace(x, lp=[lp + sign * step * (i == place) for i, lp in enumerate(x.lp)]) for sign in (1, -1)
        )  # fmt: skip
        found.append((formula(up) - formula(down)) / (2 * step))
    return found


@pytest.mark.parametrize("count", [2, 3, 4, 9])
@pytest.mark.parametrize("seed", range(3))
@every_case
def test_value_and_gradient(spec: dict[str, Any], formula: Callable[[Ranked], float], count: int, seed: int) -> None:
    for has_ties in (False, True) if spec["name"] in TAKES_TIES else (False,):
        x = drawn(count, seed, has_ties=has_ties)
        given = tensors(x)
        loss = PREFERENCE_LOSSES.build(spec).of_list(given)
        assert loss.dtype == torch.float64
        assert float(loss.detach()) == pytest.approx(formula(x), rel=1e-9, abs=1e-12)
        loss.backward()
        assert given.logp_K.grad is not None
        assert given.logp_K.grad.tolist() == pytest.approx(slopes(formula, x), rel=1e-5, abs=1e-7)


@every_case
def test_the_order_of_the_responses_does_not_matter(spec: dict[str, Any], formula: Any) -> None:
    x, loss = drawn(5, 8, has_ties=False), PREFERENCE_LOSSES.build(spec)
    order = [3, 0, 4, 2, 1]
    other = Ranked(*([column[i] for i in order] for column in vars(x).values()))
    assert loss.of_list(tensors(other)).item() == pytest.approx(loss.of_list(tensors(x)).item(), rel=1e-13)


def test_every_loss_on_lists_has_a_formula_here() -> None:
    written = {spec["name"] for spec, _ in CASES}
    assert {name for name in PREFERENCE_LOSSES if PREFERENCE_LOSSES[name].form == "list"} == written  # type: ignore[attr-defined]


def test_with_two_responses() -> None:
    """K = 2: Plackett-Luce is DPO's loss, PRO's first term -log s((r1 - r2)(s1 - s2))."""
    x = drawn(2, 5, has_ties=False)
    w, loser = (0, 1) if x.rank[0] < x.rank[1] else (1, 0)
    h = (x.lp[w] - x.ref[w]) - (x.lp[loser] - x.ref[loser])
    found = PREFERENCE_LOSSES.build({"name": "plackett_luce", "beta": 0.3}).of_list(tensors(x))
    assert found.item() == pytest.approx(math.log1p(math.exp(-0.3 * h)), rel=1e-12)
    lead = (x.reward[w] - x.reward[loser]) * (x.p[w] - x.p[loser])
    found = PREFERENCE_LOSSES.build({"name": "pro", "sft_weight": 0.0}).of_list(tensors(x))
    assert found.item() == pytest.approx(math.log1p(math.exp(-lead)), rel=1e-12)


def test_rrhf_divides_each_response_by_its_own_tokens() -> None:
    """Methods 4.1: the paper's formula, not the repository's padded length."""
    x = Ranked([-10.0, -12.0], [0.0, 0.0], [2, 10], [1, 2], [1.0, 0.0])
    # p = -5 and -1.2: the better one is behind by 3.8; its sum of log-probabilities is the SFT term.
    assert PREFERENCE_LOSSES.build({"name": "rrhf"}).of_list(tensors(x)).item() == pytest.approx(3.8 + 10.0, rel=1e-14)


def test_slic_with_the_kl_takes_what_it_is_given() -> None:
    x = drawn(3, 2, has_ties=False)
    kl = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    given = replace(tensors(x), target_kl=kl)
    loss = PREFERENCE_LOSSES.build({"name": "slic", "reg": "kl", "delta": 1.5, "lam": 0.5}).of_list(given)
    without = slic("rank")(x) + 0.5 * sum(x.lp[i] for i in x.best) / len(x.best)
    assert loss.item() == pytest.approx(without + 0.5 * 0.75, rel=1e-12)
    loss.backward()
    assert kl.grad is not None
    assert kl.grad.item() == 0.5


# KTO ---------------------------------------------------------------------------------------------------


def kto(c: float, z0: float, *, desirable: bool) -> float:
    x = 0.3 * (c - z0) if desirable else 0.3 * (z0 - c)
    return (1.5 if desirable else 0.75) * (1 - 1 / (1 + math.exp(-x)))


@pytest.mark.parametrize("seed", range(6))
def test_kto_value_and_gradient(seed: int) -> None:
    """l_D (1 - s(b (r - z0))), l_U (1 - s(b (z0 - r))), z0 = max(0, plain mean), no gradient in z0."""
    draw = random.Random(seed)
    lp, ref = ([draw.gauss(-20, 6) for _ in range(6)] for _ in range(2))
    kl_lp, kl_ref = ([draw.gauss(-20, 4) for _ in range(5)] for _ in range(2))
    is_desirable = [draw.random() < 0.5 for _ in range(6)]
    z0 = max(0.0, sum(a - b for a, b in zip(kl_lp, kl_ref, strict=True)) / 5)
    logp_B = torch.tensor(lp, dtype=torch.float64, requires_grad=True)
    kl_logp_M = torch.tensor(kl_lp, dtype=torch.float64, requires_grad=True)
    given = UnpairedLogps(
        logp_B, torch.tensor(ref, dtype=torch.float64), torch.tensor(is_desirable), kl_logp_M,
        torch.tensor(kl_ref, dtype=torch.float64),
    )  # fmt: skip
    loss = PREFERENCE_LOSSES.build({"name": "kto", "beta": 0.3, "lambda_d": 1.5, "lambda_u": 0.75})
    found_B = loss.per_response(given)
    assert found_B.dtype == torch.float64
    expected = [kto(a - b, z0, desirable=good) for a, b, good in zip(lp, ref, is_desirable, strict=True)]
    assert found_B.tolist() == pytest.approx(expected, rel=1e-9)
    found_B.sum().backward()
    assert kl_logp_M.grad is None or not kl_logp_M.grad.any(), "z0 carries a gradient"
    step = 1e-5
    slope = [
        (kto(a + step - b, z0, desirable=good) - kto(a - step - b, z0, desirable=good)) / (2 * step)
        for a, b, good in zip(lp, ref, is_desirable, strict=True)
    ]
    assert logp_B.grad is not None
    assert logp_B.grad.tolist() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_a_kl_below_0_is_0() -> None:
    zeros_B = torch.zeros(1, dtype=torch.float64)
    given = UnpairedLogps(zeros_B, zeros_B, torch.tensor([True]), zeros_B - 3, zeros_B)
    assert PREFERENCE_LOSSES.build({"name": "kto"}).per_response(given).item() == 0.5
