"""KL estimates: exact in expectation, never clamped; the controller's bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline_lib.rl.kl import Estimator, KlController, full_kl, kl_estimate

LOGP = torch.log_softmax(torch.tensor([1.0, 0.5, -2.0, 0.3], dtype=torch.float64), 0)
REF = torch.log_softmax(torch.tensor([0.2, 0.9, -1.0, 0.0], dtype=torch.float64), 0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimates_are_exact_in_expectation(estimator: Estimator) -> None:
    expected = (LOGP.exp() * kl_estimate(LOGP, REF, estimator=estimator)).sum()
    reference = torch.nn.functional.kl_div(REF, LOGP, reduction="sum", log_target=True)  # KL(policy || reference)
    assert float(expected) == pytest.approx(float(reference), rel=1e-12)
    assert float(full_kl(LOGP[None], REF[None])) == pytest.approx(float(reference), rel=1e-12)


def test_k3_is_never_negative_near_0() -> None:
    difference = torch.logspace(-8, -1, 2001)
    for sign in (1, -1):
        assert (kl_estimate(sign * difference, torch.zeros(2001), estimator="k3") >= 0).all()


@pytest.mark.parametrize(("estimator", "expected"), [("k1", -50.0), ("k2", 1250.0), ("k3", 5.184705528587072e21)])
def test_nothing_is_clamped(estimator: Estimator, expected: float) -> None:
    found = kl_estimate(torch.tensor([-60.0], dtype=torch.float64), torch.tensor([-10.0]).double(), estimator=estimator)
    assert float(found) == pytest.approx(expected, rel=1e-12)  # e^50 - 51


def test_impossible_tokens_add_nothing() -> None:
    logp = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    found = full_kl(logp, ref)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(1.3862943611198906, rel=1e-12)  # ln 4
    assert logp.grad is not None
    assert torch.isfinite(logp.grad).all()


def test_refusals() -> None:
    unknown: Any = "k4"
    with pytest.raises(ValueError, match="there is no KL estimator 'k4'"):
        kl_estimate(LOGP, REF, estimator=unknown)
    with pytest.raises(ValueError, match="must be one shape"):
        kl_estimate(LOGP, REF[:1], estimator="k1")


def test_the_controller_steers_towards_its_target() -> None:
    controller = KlController(coef=0.2, target=6.0, horizon=1000.0)
    assert controller.update(6.0, num_steps=100).coef == 0.2
    assert controller.update(6.6, num_steps=100).coef == pytest.approx(0.2 * (1 + 0.1 * 0.1), rel=1e-12)
    assert controller.update(1e9, num_steps=100).coef == pytest.approx(0.2 * 1.02, rel=1e-12)
    assert controller.update(-1e9, num_steps=100).coef == pytest.approx(0.2 * 0.98, rel=1e-12)
    assert controller.coef == 0.2  # an update is another controller
    assert controller.update(9.0, num_steps=1).target == 6.0
    assert controller.with_coef(0.7) == KlController(coef=0.7, target=6.0, horizon=1000.0)


def test_schulmans_controller_doubles_and_halves_outside_its_band() -> None:
    controller = KlController(coef=0.2, target=6.0, horizon=1000.0, kind="schulman")
    assert controller.update(9.1, num_steps=64).coef == 0.4
    assert controller.update(9.0, num_steps=64).coef == 0.2
    assert controller.update(4.0, num_steps=64).coef == 0.2
    assert controller.update(3.9, num_steps=64).coef == 0.1
    assert controller.update(-1.0, num_steps=64).coef == 0.1


def test_a_fixed_weight_stays() -> None:
    assert KlController(coef=0.2, target=6.0, horizon=1.0, kind="fixed").update(99.0, num_steps=64).coef == 0.2
    assert KlController(coef=0.2, target=None, horizon=1.0, kind="schulman").update(99.0, num_steps=64).coef == 0.2
