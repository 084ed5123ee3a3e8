"""Computes the golden numbers of the formulas, independently of the code they are compared with.

Plain Python over mpmath at 50 digits, one number at a time, after the papers' formulas: nothing of
pipeline_lib is imported. Gradients are central differences with a step of 1e-20, so they owe nothing
to any derivation. `python -m tests.golden.independent` writes the files anew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpmath import erfinv, exp, fsum, log, mp, mpf, sqrt, tanh  # type: ignore[import-untyped]

mp.dps = 50
PROVENANCE = (
    "tests/golden/independent.py: the papers' formulas in plain Python over mpmath, 50 digits, "
    "gradients by central differences"
)
STEP = mpf(10) ** -20

Case = dict[str, Any]
Row = Sequence[Any]


def numbers(draw: random.Random, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Any:
    if not shape:
        return round(draw.gauss(0, 1) * scale + shift, 3)
    return [numbers(draw, *shape[1:], scale=scale, shift=shift) for _ in range(shape[0])]


def floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [floats(inner) for inner in value]
    return float(value) if isinstance(value, mpf) else value


def places(value: Any) -> Iterator[tuple[list[Any], int]]:
    for index, inner in enumerate(value):
        if isinstance(inner, list):
            yield from places(inner)
        else:
            yield value, index


def gradient(total: Callable[[], Any], values: list[Any]) -> Any:
    """d total / d values by central differences, in the nesting of the values."""
    result = json.loads(json.dumps(values))
    for (row, index), (target, _) in zip(places(values), list(places(result)), strict=True):
        kept = row[index]
        row[index] = mpf(kept) + STEP
        upper = total()
        row[index] = mpf(kept) - STEP
        lower = total()
        row[index] = kept
        target[index] = (upper - lower) / (2 * STEP)
    return result


def log_sigma(x: Any) -> Any:
    return -log(1 + exp(-mpf(x)))


# tokens ----------------------------------------------------------------------------------------------


def token_logps(given: Case) -> tuple[list[Any], list[Any]]:
    bias = given.get("head_bias_V") or [0] * len(given["head_weight_VD"])
    logps, entropies = [], []
    for hidden, label in zip(given["hidden_ND"], given["labels_N"], strict=True):
        logits = [
            fsum(mpf(h) * mpf(w) for h, w in zip(hidden, row, strict=True)) + b
            for row, b in zip(given["head_weight_VD"], bias, strict=True)
        ]
        if "softcap" in given:
            logits = [mpf(given["softcap"]) * tanh(logit / mpf(given["softcap"])) for logit in logits]
        logits = [logit / mpf(given["temperature"]) for logit in logits]
        normaliser = log(fsum(exp(logit) for logit in logits))
        logps.append(logits[label] - normaliser)
        entropies.append(-fsum(exp(logit - normaliser) * (logit - normaliser) for logit in logits))
    return logps, entropies


def tokens() -> Iterator[Case]:
    draw = random.Random(1)
    for name, temperature, with_bias, scale in (
        ("plain", 1.0, False, 1.0),
        ("bias and temperature", 0.7, True, 1.0),
        ("far apart", 1.9, True, 30.0),
        ("capped", 0.8, True, 3.0),
    ):
        given: Case = {
            "hidden_ND": numbers(draw, 5, 3, scale=scale), "head_weight_VD": numbers(draw, 7, 3),
            "labels_N": [0, 6, 3, 3, 1], "temperature": temperature,
        }  # fmt: skip
        if with_bias:
            given["head_bias_V"] = numbers(draw, 7)
        if name == "capped":
            given["softcap"] = 1.7
        weights = numbers(draw, 5)

        def total(given: Case = given, weights: Row = weights) -> Any:
            return fsum(mpf(w) * logp for w, logp in zip(weights, token_logps(given)[0], strict=True))

        logp, entropy = token_logps(given)
        learned = [key for key in ("hidden_ND", "head_weight_VD", "head_bias_V") if key in given]
        yield {
            "name": name, "call": "token_logps_from_hidden", "given": given, "weights": weights,
            "expected": {"0": logp, "1": entropy}, "gradient": {key: gradient(total, given[key]) for key in learned},
        }  # fmt: skip


# losses ----------------------------------------------------------------------------------------------


def policy() -> Iterator[Case]:
    draw = random.Random(2)
    given: Case = {
        "token_logp": numbers(draw, 4, 5, scale=0.4, shift=-2),
        "old_token_logp": numbers(draw, 4, 5, scale=0.4, shift=-2), "advantages": numbers(draw, 4, 5),
        "mask": [[t <= row + 1 for t in range(5)] for row in range(4)],
    }  # fmt: skip
    for epsilon in (0.2, 0.05):

        def terms(epsilon: float = epsilon) -> Iterator[tuple[Any, Any, Any]]:
            for new, old, advantage, counts in zip(*(given[key] for key in given), strict=True):
                for lp, lo, a, m in zip(new, old, advantage, counts, strict=True):
                    if m:
                        ratio = exp(mpf(lp) - mpf(lo))
                        bounded = min(max(ratio, 1 - mpf(epsilon)), 1 + mpf(epsilon))
                        yield -mpf(a) * ratio, -mpf(a) * bounded, mpf(lp) - mpf(lo)

        def total(terms: Any = terms) -> Any:
            return fsum(max(plain, clipped) for plain, clipped, _ in terms())

        yield {
            "name": f"policy loss, clip range {epsilon}", "call": "clipped_policy_loss",
            "given": {**given, "clip_range": epsilon},
            "expected": {
                "loss_sum": total(), "num_clipped": sum(clipped > plain for plain, clipped, _ in terms()),
                "approx_kl_sum": fsum(d * d / 2 for _, _, d in terms()), "policy_kl_sum": fsum(-d for *_, d in terms()),
            },
            "gradient": {"token_logp": gradient(total, given["token_logp"])},
        }  # fmt: skip


def value() -> Iterator[Case]:
    draw = random.Random(3)
    given: Case = {
        "values": numbers(draw, 4, 5, scale=0.5), "old_values": numbers(draw, 4, 5, scale=0.5),
        "returns": numbers(draw, 4, 5), "mask": [[t <= row + 1 for t in range(5)] for row in range(4)],
    }  # fmt: skip

    def terms() -> Iterator[tuple[Any, Any]]:
        for rows in zip(*(given[key] for key in given), strict=True):
            for v, old, target, m in zip(*rows, strict=True):
                if m:
                    kept = min(max(mpf(v), mpf(old) - mpf("0.2")), mpf(old) + mpf("0.2"))
                    yield (mpf(v) - mpf(target)) ** 2, (kept - mpf(target)) ** 2

    def total() -> Any:
        return fsum(max(plain, clipped) for plain, clipped in terms()) / 2

    yield {
        "name": "value loss", "call": "clipped_value_loss", "given": {**given, "value_clip_range": 0.2},
        "expected": {"loss_sum": total(), "num_clipped": sum(clipped > plain for plain, clipped in terms())},
        "gradient": {"values": gradient(total, given["values"])},
    }  # fmt: skip


def reward() -> Iterator[Case]:
    draw = random.Random(4)
    for name, margin, centring in (("plain", False, 0.0), ("margin", True, 0.0), ("both", True, 0.01)):
        given: Case = {"better_P": numbers(draw, 6, scale=3), "worse_P": numbers(draw, 6, scale=3)}
        if margin:
            given["margin_P"] = [0.0, 1 / 3, 2 / 3, 1.0, 2.0, 3.0]
        weights = numbers(draw, 6)

        def losses(given: Case = given, centring: float = centring) -> list[Any]:
            return [
                -log_sigma(mpf(w) - mpf(loser) - mpf(m)) + mpf(centring) * (mpf(w) + mpf(loser)) ** 2
                for w, loser, m in zip(
                    given["better_P"], given["worse_P"], given.get("margin_P", [0.0] * 6), strict=True
                )
            ]

        def total(losses: Any = losses, weights: Row = weights) -> Any:
            return fsum(mpf(w) * loss for w, loss in zip(weights, losses(), strict=True))

        yield {
            "name": name, "call": "bradley_terry", "given": {**given, "centring": centring}, "weights": weights,
            "expected": {"value": losses()},
            "gradient": {key: gradient(total, given[key]) for key in ("better_P", "worse_P")},
        }  # fmt: skip


def dpo() -> Iterator[Case]:
    draw = random.Random(5)
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.1), (2.0, 0.49)):
        keys = ("chosen_B", "rejected_B", "ref_chosen_B", "ref_rejected_B")
        given: Case = {key: numbers(draw, 4, scale=6, shift=-40) for key in keys}
        weights = numbers(draw, 4)

        def losses(given: Case = given, beta: float = beta, smoothing: float = smoothing) -> list[Any]:
            found = []
            for w, loser, ref_w, ref_l in zip(*(given[key] for key in given), strict=True):
                h = mpf(beta) * ((mpf(w) - mpf(ref_w)) - (mpf(loser) - mpf(ref_l)))
                found.append(-(1 - mpf(smoothing)) * log_sigma(h) - mpf(smoothing) * log_sigma(-h))
            return found

        def total(losses: Any = losses, weights: Row = weights) -> Any:
            return fsum(mpf(w) * loss for w, loss in zip(weights, losses(), strict=True))

        yield {
            "name": f"beta {beta}, label smoothing {smoothing}", "call": "per_pair", "weights": weights,
            "given": {**given, "parameters": {"beta": beta, "label_smoothing": smoothing}},
            "expected": {"value": losses()},
            "gradient": {key: gradient(total, given[key]) for key in ("chosen_B", "rejected_B")},
        }  # fmt: skip


# rl --------------------------------------------------------------------------------------------------


def advantage() -> Iterator[Case]:
    draw = random.Random(6)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.97, 1.0)):
        rewards, values, lengths = numbers(draw, 3, 6), numbers(draw, 3, 6), (6, 3, 1)
        advantages = [[mpf(0)] * 6 for _ in range(3)]
        for row, length in enumerate(lengths):
            value_at = [mpf(v) for v in values[row][:length]] + [mpf(0)]
            for t in range(length):  # A_t = sum over l of (gamma lambda)^l delta_{t+l}, as it is printed
                advantages[row][t] = fsum(
                    (mpf(gamma) * mpf(lam)) ** (s - t)
                    * (mpf(rewards[row][s]) + mpf(gamma) * value_at[s + 1] - value_at[s])
                    for s in range(t, length)
                )
        returns = [
            [advantages[r][t] + mpf(values[r][t]) if t < length else mpf(0) for t in range(6)]
            for r, length in enumerate(lengths)
        ]
        mask = [[t < length for t in range(6)] for length in lengths]
        yield {
            "name": f"gamma {gamma}, lambda {lam}", "call": "gae",
            "given": {
                "rewards_BT": rewards, "values_BT": values, "response_mask_BT": mask, "gamma": gamma, "gae_lambda": lam
            },
            "expected": {"0": advantages, "1": returns},
        }  # fmt: skip
    yield from whitening(draw)


def whitening(draw: random.Random) -> Iterator[Case]:
    values, mask = numbers(draw, 3, 4, scale=2, shift=5), [[t <= r + 1 for t in range(4)] for r in range(3)]
    for shift in (True, False):
        for unbiased in (True, False):
            counted = [mpf(v) for row, m in zip(values, mask, strict=True) for v, c in zip(row, m, strict=True) if c]
            mean = fsum(counted) / len(counted)
            variance = fsum((v - mean) ** 2 for v in counted) / (len(counted) - (1 if unbiased else 0))
            scaled = [
                [
                    (mpf(v) - mean) / sqrt(variance + mpf("1e-8")) + (0 if shift else mean) if c else mpf(0)
                    for v, c in zip(row, m, strict=True)
                ]
                for row, m in zip(values, mask, strict=True)
            ]
            yield {
                "name": f"whiten, shift_mean {shift}, unbiased {unbiased}", "call": "whiten",
                "given": {"values": values, "mask": mask, "shift_mean": shift, "unbiased": unbiased},
                "expected": {"value": scaled},
            }  # fmt: skip


def kl() -> Iterator[Case]:
    draw = random.Random(7)
    formulas: dict[str, Callable[[Any], Any]] = {
        "k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: exp(-d) - 1 + d
    }  # fmt: skip
    for name, formula in formulas.items():
        own, ref, weights = numbers(draw, 6, shift=-2), numbers(draw, 6, shift=-2), numbers(draw, 6)

        def total(own: Row = own, ref: Row = ref, weights: Row = weights, formula: Any = formula) -> Any:
            return fsum(mpf(w) * formula(mpf(a) - mpf(b)) for w, a, b in zip(weights, own, ref, strict=True))

        yield {
            "name": name, "call": "kl_estimate", "weights": weights,
            "given": {"token_logp": own, "ref_token_logp": ref, "estimator": name},
            "expected": {"value": [formula(mpf(a) - mpf(b)) for a, b in zip(own, ref, strict=True)]},
            "gradient": {"token_logp": gradient(total, own)},
        }  # fmt: skip
    for kl_nats, num_steps in ((6.6, 512), (60.0, 256), (0.0, 512), (5.4, 1)):
        error = min(max(mpf(kl_nats) / 6 - 1, mpf("-0.2")), mpf("0.2"))
        yield {
            "name": f"controller at {kl_nats} nats", "call": "update",
            "given": {
                "parameters": {"coef": 0.15, "target": 6.0, "horizon": 10000.0}, "kl_nats": kl_nats,
                "num_steps": num_steps,
            },
            "expected": {"coef": mpf("0.15") * (1 + error * num_steps / 10000)},
        }  # fmt: skip


# evaluation ------------------------------------------------------------------------------------------


def wilson() -> Iterator[Case]:
    for right, pairs, confidence in ((61, 100, 0.95), (20, 20, 0.975), (0, 7, 0.9), (3, 4, 0.99)):
        z, p, n = sqrt(mpf(2)) * erfinv(mpf(confidence)), mpf(right) / pairs, mpf(pairs)
        # The two roots of (p - x)^2 = z^2 x (1 - x) / n.
        a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
        root = sqrt(b * b - 4 * a * c)
        yield {
            "name": f"{right} of {pairs} at {confidence}", "call": "measure",
            "given": {"accuracy": right / pairs, "pairs": pairs, "confidence_frac": confidence},
            "expected": {"value": p, "low": (-b - root) / (2 * a), "high": (-b + root) / (2 * a)},
        }  # fmt: skip


FILES: dict[str, tuple[str, Callable[[], Iterator[Case]]]] = {
    "tokens": ("pipeline_lib.losses.tokens", tokens),
    "policy_loss": ("pipeline_lib.losses.policy", policy),
    "value_loss": ("pipeline_lib.losses.policy", value),
    "bradley_terry": ("pipeline_lib.losses.reward.pairs", reward),
    "dpo": ("pipeline_lib.losses.preference.dpo", dpo),
    "advantage": ("pipeline_lib.rl.advantage", advantage),
    "kl": ("pipeline_lib.rl.kl", kl),
    "wilson": ("pipeline_lib.evaluation.gate_metrics.reward_model_accuracy", wilson),
}


def all_files() -> dict[str, tuple[str, Callable[[], Iterator[Case]]]]:
    """Return every file's topic, module and cases."""
    from tests.golden import independent_losses  # it needs the arithmetic above

    return {**FILES, **independent_losses.FILES}


def content(topic: str) -> str:
    """Return what the golden file of a topic holds, a case a line."""
    module, cases = all_files()[topic]
    lines = ",\n".join(json.dumps(floats(case)) for case in cases())
    return f'{{"provenance": {json.dumps(PROVENANCE)},\n"module": "{module}",\n"cases": [\n{lines}\n]}}\n'


def main() -> None:
    for topic in all_files():
        path = Path(__file__).with_name(f"{topic}.json")
        path.write_text(content(topic), encoding="utf-8")


if __name__ == "__main__":
    main()
