"""Golden numbers of the preference and reward losses: the papers' formulas, one number at a time, over mpmath.

Sums and products as they are printed, without the rearrangements that make them safe in float64.
`python -m tests.golden.independent` writes the files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from mpmath import exp, fsum, log, mpf  # type: ignore[import-untyped]

from tests.golden.independent import Case, gradient, log_sigma, numbers

HERE = "pipeline_lib.losses"
PAIR_KEYS = ("chosen_B", "rejected_B", "ref_chosen_B", "ref_rejected_B", "chosen_tokens_B", "rejected_tokens_B")


def sigma(x: Any) -> Any:
    return 1 / (1 + exp(-x))


# pairs -----------------------------------------------------------------------------------------------


class Pair:
    """The figures of one pair, at 50 digits."""

    def __init__(self, given: Case, place: int) -> None:
        self.w, self.l, self.ref_w, self.ref_l, self.tokens_w, self.tokens_l = (mpf(given[k][place]) for k in PAIR_KEYS)
        self.gap = given["reward_gap_B"][place] if "reward_gap_B" in given else None
        self.nll = mpf(given["chosen_nll_B"][place]) if "chosen_nll_B" in given else -self.w / self.tokens_w
        self.kl = mpf(given["chosen_kl_B"][place]) if "chosen_kl_B" in given else None
        self.c_w, self.c_l = self.w - self.ref_w, self.l - self.ref_l
        self.h = self.c_w - self.c_l

    @property
    def log_odds(self) -> Any:
        odds = []
        for logp, tokens in ((self.w, self.tokens_w), (self.l, self.tokens_l)):
            probability = exp(logp / tokens)
            odds.append(log(probability / (1 - probability)))
        return odds[0] - odds[1]


def _smoothed(x: Any, e: Any) -> Any:
    return -(1 - e) * log_sigma(x) - e * log_sigma(-x)


def _exo(p: Pair, beta: Any, e: Any) -> Any:
    won = sigma(beta * p.h)
    return won * log(won / (1 - e)) + (1 - won) * log((1 - won) / e)


def _odpo(p: Pair, q: Case) -> Any:
    scaled = {"log": log, "identity": mpf}[q.get("scaling", "log")]
    offset = mpf(q.get("offset", 0)) if p.gap is None else q["alpha"] * scaled(mpf(p.gap))
    return -log_sigma(q["beta"] * p.h - offset)


PAIR_LOSSES: list[tuple[str, str, Case, Callable[[Pair, Case], Any]]] = [
    ("dpo", "Dpo", {"beta": 0.1, "sft_coef": 0.3}, lambda p, q: -log_sigma(q["beta"] * p.h) + q["sft_coef"] * p.nll),
    ("robust", "Robust", {"beta": 0.2, "label_smoothing": 0.3},
     lambda p, q: (_smoothed(q["beta"] * p.h, q["label_smoothing"]) + 2 * q["label_smoothing"]
                   * log_sigma(-q["beta"] * p.h)) / (1 - 2 * q["label_smoothing"])),
    ("ipo", "Ipo", {"tau": 0.1, "reduction": "sum"}, lambda p, q: (p.h - 1 / (2 * q["tau"])) ** 2),
    ("ipo", "Ipo", {"tau": 0.7, "reduction": "mean"},
     lambda p, q: (p.c_w / p.tokens_w - p.c_l / p.tokens_l - 1 / (2 * q["tau"])) ** 2),
    ("hinge", "Hinge", {"beta": 0.3}, lambda p, q: max(mpf(0), 1 - q["beta"] * p.h)),
    ("length_normalized", "LengthNormalized", {"beta": 5.0},
     lambda p, q: -log_sigma(q["beta"] * (p.c_w / p.tokens_w - p.c_l / p.tokens_l))),
    ("r_dpo", "RDpo", {"beta": 0.1, "alpha": 0.05},
     lambda p, q: -log_sigma(q["beta"] * p.h - q["alpha"] * (p.tokens_w - p.tokens_l))),
    ("odpo", "Odpo", {"beta": 0.1, "offset": 0.7}, _odpo),
    ("odpo", "Odpo", {"beta": 0.1, "alpha": 2.0, "rewarded": True}, _odpo),
    ("odpo", "Odpo", {"beta": 0.1, "alpha": 0.5, "scaling": "identity", "rewarded": True}, _odpo),
    ("exo", "Exo", {"beta": 0.1, "label_smoothing": 0.01}, lambda p, q: _exo(p, q["beta"], q["label_smoothing"])),
    ("nca", "Nca", {"beta": 0.1},
     lambda p, q: -log_sigma(q["beta"] * p.c_w) - (log_sigma(-q["beta"] * p.c_w) + log_sigma(-q["beta"] * p.c_l)) / 2),
    ("sppo", "Sppo", {"beta": 0.5},
     lambda p, q: (p.c_w - 1 / (2 * q["beta"])) ** 2 + (p.c_l + 1 / (2 * q["beta"])) ** 2),
    ("apo_zero", "ApoZero", {"beta": 0.1}, lambda p, q: 1 - sigma(q["beta"] * p.c_w) + sigma(q["beta"] * p.c_l)),
    ("apo_down", "ApoDown", {"beta": 0.1}, lambda p, q: sigma(q["beta"] * p.c_w) + 1 - sigma(q["beta"] * p.h)),
    ("simpo", "SimPo", {"beta": 2.0, "gamma": 0.5},
     lambda p, q: -log_sigma(q["beta"] * (p.w / p.tokens_w - p.l / p.tokens_l) - q["gamma"])),
    ("orpo", "Orpo", {"lam": 0.25}, lambda p, q: p.nll - q["lam"] * log_sigma(p.log_odds)),
    ("orpo", "Orpo", {"lam": 0.25, "with_nll": True}, lambda p, q: p.nll - q["lam"] * log_sigma(p.log_odds)),
    ("cpo", "Cpo", {"beta": 0.1, "label_smoothing": 0.2, "nll_coef": 0.5},
     lambda p, q: _smoothed(q["beta"] * (p.w - p.l), q["label_smoothing"]) + q["nll_coef"] * p.nll),
    ("slic", "Slic", {"delta": 2.0, "reg": "ce", "lam": 0.3},
     lambda p, q: max(mpf(0), q["delta"] - p.w + p.l) - q["lam"] * p.w),
    ("slic", "Slic", {"delta": 2.0, "reg": "kl", "lam": 0.3},
     lambda p, q: max(mpf(0), q["delta"] - p.w + p.l) + q["lam"] * p.kl),
]  # fmt: skip


def pair_losses() -> Iterator[Case]:
    draw = random.Random(11)
    for name, cls, chosen, formula in PAIR_LOSSES:
        given: Case = {key: numbers(draw, 4, scale=5, shift=-40) for key in PAIR_KEYS[:4]}
        given |= {key: [draw.randint(5, 40) for _ in range(4)] for key in PAIR_KEYS[4:]}
        parameters = dict(chosen)
        if parameters.pop("rewarded", False):
            given["reward_gap_B"] = [0.5, 1.0, 2.25, 7.0]
        if parameters.pop("with_nll", False):
            given["chosen_nll_B"] = [1.25, 0.5, 2.0, 3.75]
        if parameters.get("reg") == "kl":
            given["chosen_kl_B"] = [0.5, 0.0, 2.0, 3.75]
        weights = numbers(draw, 4)
        exact = {key: mpf(value) if isinstance(value, float) else value for key, value in parameters.items()}

        def losses(given: Case = given, exact: Case = exact, formula: Any = formula) -> list[Any]:
            return [formula(Pair(given, place), exact) for place in range(4)]

        yield from _case(f"{HERE}.preference.{name}", cls, "per_pair", given, parameters, losses, weights)


def _case(
    module: str,
    cls: str,
    call: str,
    given: Case,
    parameters: Case,
    losses: Callable[[], Any],
    weights: list[Any] | None,
) -> Iterator[Case]:
    def total() -> Any:
        values = losses()
        return values if weights is None else fsum(mpf(w) * value for w, value in zip(weights, values, strict=True))

    learned = [key for key in ("chosen_B", "rejected_B", "logp_K", "logp_B", "scores_K") if key in given]
    expected = {"0": losses(), "1": given["weight"]} if call == "of_prompt" else {"value": losses()}
    yield {
        "name": f"{cls} {parameters}", "module": module, "class": cls, "call": call,
        "given": {**given, "parameters": parameters}, "expected": expected,
        **({} if weights is None else {"weights": weights}),
        "gradient": {key: gradient(total, given[key]) for key in learned},
    }  # fmt: skip


# lists -----------------------------------------------------------------------------------------------


class Ranked:
    """The responses of one prompt, at 50 digits."""

    def __init__(self, given: Case) -> None:
        self.lp, self.ref, self.tokens, self.reward = (
            [mpf(v) for v in given[key]] for key in ("logp_K", "ref_logp_K", "tokens_K", "reward_K")
        )
        self.rank, self.k = given["rank_K"], range(len(given["rank_K"]))
        self.kl = mpf(given["target_kl"]) if "target_kl" in given else None
        self.p = [lp / tokens for lp, tokens in zip(self.lp, self.tokens, strict=True)]
        self.pairs = [(i, j) for i in self.k for j in self.k if self.rank[i] < self.rank[j]]

    @property
    def best(self) -> Any:
        tied = [self.lp[i] for i in self.k if self.rank[i] == min(self.rank)]
        return fsum(tied) / len(tied)


def _plackett_luce(scores: list[Any], rank: list[int]) -> Any:
    total = mpf(0)
    for k in range(len(rank)):
        among = [exp(scores[j]) for j in range(len(rank)) if j == k or rank[j] > rank[k]]
        total -= log(exp(scores[k]) / fsum(among))
    return total


def _pro(r: Ranked, q: Case) -> Any:
    total = mpf(0)
    for k in r.k:
        worse = [i for i in r.k if r.reward[i] < r.reward[k]]
        if worse:
            temperatures = {i: 1 / (r.reward[k] - r.reward[i]) for i in worse}
            own = exp(r.p[k] / min(temperatures.values()))
            total -= log(own / (own + fsum(exp(r.p[i] / temperatures[i]) for i in worse)))
    return total - q["sft_weight"] * (len(r.rank) - 1) ** 2 * r.best


def _slic(r: Ranked, q: Case) -> Any:
    place = [sum(r.rank[j] < r.rank[i] for j in r.k) for i in r.k]
    terms = {
        "rank": lambda i, j: q["delta"] - r.lp[i] + r.lp[j],
        "margin": lambda i, j: q["delta"] * (r.reward[i] - r.reward[j]) - r.lp[i] + r.lp[j],
        "list": lambda i, j: q["delta"] * abs(place[i] - place[j]) - r.lp[i] + r.lp[j],
    }
    if q["kind"] == "reward":
        calibration = -fsum(s * exp(lp) for s, lp in zip(r.reward, r.lp, strict=True)) / fsum(exp(lp) for lp in r.lp)
    else:
        calibration = fsum(max(mpf(0), terms[q["kind"]](i, j)) for i, j in r.pairs)
        if q["kind"] != "list":
            calibration /= len(r.pairs)
    return calibration + q["lam"] * {"ce": -r.best, "kl": r.kl, "none": 0}[q["reg"]]


def _rrhf(r: Ranked, q: Case) -> Any:
    return q["rank_coef"] * fsum(max(mpf(0), r.p[j] - r.p[i]) for i, j in r.pairs) - r.best


LIST_LOSSES: list[tuple[str, str, Case, Callable[[Ranked, Case], Any]]] = [
    ("plackett_luce", "PlackettLuce", {"beta": 0.1, "sft_coef": 0.0},
     lambda r, q: _plackett_luce([q["beta"] * (a - b) for a, b in zip(r.lp, r.ref, strict=True)], r.rank)),
    ("rrhf", "Rrhf", {"rank_coef": 1.0}, _rrhf),
    ("rrhf", "Rrhf", {"rank_coef": 100.0}, _rrhf),
    ("pro", "Pro", {"sft_weight": 0.05}, _pro),
    *(("slic", "Slic", {"kind": kind, "reg": reg, "delta": 1.5, "lam": 0.3}, _slic)
      for kind, reg in (("rank", "ce"), ("rank", "kl"), ("margin", "ce"), ("list", "none"), ("reward", "ce"))),
]  # fmt: skip


def list_losses() -> Iterator[Case]:
    draw = random.Random(12)
    for name, cls, parameters, formula in LIST_LOSSES:
        for rank in ([2, 1], [3, 1, 4, 2], [1, 3, 1, 3, 2]):
            given: Case = {key: numbers(draw, len(rank), scale=2, shift=-30) for key in ("logp_K", "ref_logp_K")}
            given |= {"tokens_K": [draw.randint(10, 30) for _ in rank], "rank_K": rank}
            given["reward_K"] = [{1: 2.5, 2: 1.0, 3: 0.25, 4: -1.5}[place] for place in rank]
            if parameters.get("reg") == "kl":
                given["target_kl"] = 3.25
            exact = {key: mpf(value) if isinstance(value, float) else value for key, value in parameters.items()}

            def loss(given: Case = given, exact: Case = exact, formula: Any = formula) -> Any:
                return formula(Ranked(given), exact)

            yield from _case(f"{HERE}.preference.{name}", cls, "of_list", given, parameters, loss, None)


# single responses ------------------------------------------------------------------------------------


def unpaired_losses() -> Iterator[Case]:
    draw = random.Random(13)
    for parameters, shift in (({"beta": 0.1}, 0.0), ({"beta": 0.3, "lambda_d": 1.5, "lambda_u": 0.5}, 4.0),
                              ({"beta": 0.1, "lambda_d": 2.0}, -9.0)):  # fmt: skip
        given: Case = {key: numbers(draw, 4, scale=5, shift=-40) for key in ("logp_B", "ref_logp_B")}
        given["is_desirable_B"] = [True, False, False, True]
        given["kl_ref_logp_M"] = numbers(draw, 3, scale=2, shift=-40)
        given["kl_logp_M"] = [value + shift + draw.choice([0.5, 0.25]) for value in given["kl_ref_logp_M"]]
        weights = numbers(draw, 4)

        def losses(given: Case = given, parameters: dict[str, float] = parameters) -> list[Any]:
            apart = [mpf(a) - mpf(b) for a, b in zip(given["kl_logp_M"], given["kl_ref_logp_M"], strict=True)]
            z0, beta = max(mpf(0), fsum(apart) / 3), mpf(parameters["beta"])
            found = []
            for a, b, good in zip(given["logp_B"], given["ref_logp_B"], given["is_desirable_B"], strict=True):
                r = mpf(a) - mpf(b)
                weight = mpf(parameters.get("lambda_d" if good else "lambda_u", 1.0))
                found.append(weight * (1 - sigma(beta * (r - z0 if good else z0 - r))))
            return found

        yield from _case(f"{HERE}.preference.kto", "Kto", "per_response", given, parameters, losses, weights)


# reward models ---------------------------------------------------------------------------------------


def _comparisons(r: list[Any], rank: list[int], q: Case, strength: str | None) -> list[Any]:
    margins = {"small": (1, mpf(2) / 3, mpf(1) / 3, 0), "large": (3, 2, 1, 0), "none": (0, 0, 0, 0)}[
        q.get("margins", "none")
    ]
    names = ("significantly", "better", "slightly", "unsure", None)
    margin = dict(zip(names, (*margins, 0), strict=True))[strength]
    return [
        _smoothed(r[i] - r[j] - margin, mpf(q.get("label_smoothing", 0)))
        + mpf(q.get("centring", 0)) * (r[i] + r[j]) ** 2
        for i in range(len(r)) for j in range(len(r)) if rank[i] < rank[j]
    ]  # fmt: skip


def _of_prompt(cls: str, r: list[Any], rank: list[int], q: Case, strength: str | None) -> tuple[Any, Any]:
    """Return the unweighted loss of a prompt and its unweighted share of the divisor."""
    found = _comparisons(r, rank, q, strength)
    if cls == "BradleyTerry":
        return fsum(found), len(found)
    if cls == "KWise":
        pairs = len(list(combinations(r, 2))) if q.get("divisor", "all") == "all" else len(found)
        return fsum(found) / pairs, 1
    centring = mpf(q.get("centring", 0))
    if cls == "PlackettLuce":
        both = [(r[i] + r[j]) ** 2 for i in range(len(r)) for j in range(len(r)) if rank[i] < rank[j]]
        return _plackett_luce(r, rank) + centring * fsum(both) / len(both), 1
    e, best = mpf(q.get("label_smoothing", 0)), [place == min(rank) for place in rank]
    target = [(1 - e) * is_best / mpf(sum(best)) + e / len(r) for is_best in best]
    logs = [log(exp(score) / fsum(exp(other) for other in r)) for score in r]
    return -fsum(t * lp for t, lp in zip(target, logs, strict=True)) + centring * (2 * fsum(r) / len(r)) ** 2, 1


REWARD_LOSSES: list[tuple[str, str, Case, str | None]] = [
    ("bradley_terry", "BradleyTerry", {}, None),
    ("bradley_terry", "BradleyTerry", {"centring": 0.01, "label_smoothing": 0.1, "margins": "small"}, "better"),
    ("bradley_terry", "BradleyTerry", {"margins": "large"}, "significantly"),
    ("bradley_terry", "BradleyTerry", {"margins": "large"}, None),
    ("kwise", "KWise", {}, None),
    ("kwise", "KWise", {"divisor": "valid", "centring": 0.01, "margins": "small"}, "slightly"),
    ("plackett_luce", "PlackettLuce", {"centring": 0.02}, "better"),
    ("best_of_k", "BestOfK", {"centring": 0.02, "label_smoothing": 0.2}, None),
]


def reward_losses() -> Iterator[Case]:
    draw = random.Random(14)
    for name, cls, parameters, strength in REWARD_LOSSES:
        for rank in ([2, 1], [3, 1, 4, 2], [1, 3, 1, 3, 2]):
            given: Case = {"scores_K": numbers(draw, len(rank), scale=2), "rank_K": rank, "weight": 0.75}
            given |= {} if strength is None else {"strength": strength}

            def loss(
                given: Case = given, cls: str = cls, parameters: Case = parameters, strength: str | None = strength
            ) -> Any:
                r = [mpf(value) for value in given["scores_K"]]
                return mpf("0.75") * _of_prompt(cls, r, given["rank_K"], parameters, strength)[0]

            share = 0.75 * _of_prompt(cls, given["scores_K"], rank, parameters, strength)[1]
            for case in _case(f"{HERE}.reward.{name}", cls, "of_prompt", given, parameters, loss, None):
                yield {**case, "expected": {**case["expected"], "1": share}}


FILES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "pair_losses": (f"{HERE}.preference", pair_losses),
    "list_losses": (f"{HERE}.preference", list_losses),
    "unpaired_losses": (f"{HERE}.preference", unpaired_losses),
    "reward_losses": (f"{HERE}.reward", reward_losses),
}
