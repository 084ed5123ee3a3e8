"""Numbers of preference losses worked by hand, identities between them, and their edges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.preference.contract import PairLogps, RankedLogps, UnpairedLogps


def build(name: str, **parameters: Any) -> Any:
    return PREFERENCE_LOSSES.build({"name": name, **parameters})


def pair(
    chosen: float, rejected: float, ref: tuple[float, float] = (0.0, 0.0), tokens: tuple[int, int] = (1, 1)
) -> PairLogps:
    wide = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, *ref)]
    return PairLogps(*wide, *(torch.tensor([count]) for count in tokens))


def ranked(logps: list[float], ranks: list[int], rewards: list[float] | None = None, tokens: int = 1) -> RankedLogps:
    logp_K = torch.tensor(logps, dtype=torch.float64)
    return RankedLogps(
        logp_K, torch.zeros(len(logps), dtype=torch.float64), torch.full((len(logps),), tokens), torch.tensor(ranks),
        torch.tensor(rewards or [-float(rank) for rank in ranks], dtype=torch.float64),
    )  # fmt: skip


AT_THE_REFERENCE = {
    "dpo": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0, "length_normalized": math.log(2),
    "nca": 2 * math.log(2), "sppo": 50.0, "apo_zero": 1.0, "apo_down": 1.0, "odpo": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), list(AT_THE_REFERENCE.items()))
def test_where_the_policy_is_its_reference(name: str, value: float) -> None:
    start = pair(-30.0, -50.0, (-30.0, -50.0), (7, 9))
    assert float(build(name).per_pair(start)) == pytest.approx(value, rel=1e-12)


BY_HAND = [
    # h = 3 - (-1) = 4 with chosen +3 and rejected -1 over the reference.
    ("robust", {"beta": 0.25, "label_smoothing": 0.25},  # -(3/4) ln s(1) + (1/4) ln s(-1), over 1/2
     2 * (0.75 * math.log(1 + math.exp(-1)) - 0.25 * math.log(1 + math.exp(1)))),
    ("ipo", {"tau": 0.5}, 9.0), ("ipo", {"tau": 0.5, "reduction": "mean"}, 0.5625),  # (4 - 1)^2, (3/2 + 1/4 - 1)^2
    ("hinge", {"beta": 0.125}, 0.5), ("sppo", {"beta": 0.25}, 2.0),  # (3 - 2)^2 + (-1 + 2)^2
    ("r_dpo", {"beta": 0.25, "alpha": 0.5}, math.log(1 + math.exp(-2))),  # 1 - 0.5 (2 - 4)
    ("odpo", {"beta": 0.25, "offset": 1.0}, math.log(2)),
    ("simpo", {"beta": 2.0, "gamma": 0.5}, math.log(1 + math.exp(-3.0))),  # 2 (3/2 + 1/4) - 1/2
]  # fmt: skip


@pytest.mark.parametrize(("name", "parameters", "value"), BY_HAND)
def test_by_hand(name: str, parameters: dict[str, Any], value: float) -> None:
    assert float(build(name, **parameters).per_pair(pair(3.0, -1.0, tokens=(2, 4)))) == pytest.approx(value, rel=1e-12)


def test_odpo_takes_the_offset_out_of_rewards_where_there_are_any() -> None:
    batch = PairLogps(
        *(torch.tensor([value] * 4, dtype=torch.float64) for value in (3.0, -1, 0, 0)), *[torch.ones(4)] * 2
    )
    gaps = torch.tensor([math.e, float("nan"), 0.0, -2.0], dtype=torch.float64)
    chosen_B = batch.chosen_B.clone().requires_grad_()
    loss_B = build("odpo", beta=0.25, offset=0.5).per_pair(replace(batch, chosen_B=chosen_B, reward_gap_B=gaps))
    # Offsets: ln e = 1; the fixed 0.5; no reward in favour: a loss and a gradient of 0.
    assert loss_B.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-0.5)), 0.0, 0.0], rel=1e-12)
    loss_B.sum().backward()
    assert chosen_B.grad is not None
    assert chosen_B.grad.tolist() == pytest.approx([-0.125, -0.25 / (1 + math.exp(0.5)), 0.0, 0.0], rel=1e-12)
    whole = build("odpo", beta=0.25, alpha=0.0).per_pair(replace(batch, reward_gap_B=gaps))
    assert whole.tolist() == pytest.approx([math.log(1 + math.exp(-1))] * 4, rel=1e-12)


def test_orpo_by_hand_and_at_certainty() -> None:
    # P = 1/2 and 1/4: odds 1 and 1/3, so -ln s(ln 3) = ln 4/3; NLL ln 2.
    batch = pair(2 * math.log(0.5), 3 * math.log(0.25), tokens=(2, 3))
    assert float(build("orpo", lam=0.5).per_pair(batch)) == pytest.approx(
        math.log(2) + 0.5 * math.log(4 / 3), rel=1e-12
    )
    given = replace(batch, chosen_nll_B=torch.tensor([2.0]).double())
    assert float(build("orpo", lam=0.5).per_pair(given)) == pytest.approx(2 + 0.5 * math.log(4 / 3), rel=1e-12)
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-300, -1e9)):
        values = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected)]
        loss_B = build("orpo").per_pair(replace(batch, chosen_B=values[0], rejected_B=values[1]))
        loss_B.sum().backward()
        assert torch.isfinite(loss_B).all()
        for value in values:
            assert value.grad is not None
            assert torch.isfinite(value.grad).all()


def test_kto_by_hand() -> None:
    # Log-ratios 3 and -1 about z0 = max(0, mean(2, 0)) = 1, or 0 where the mean is below 0 or of nothing.
    logp_B = torch.tensor([3.0, -1.0], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.float64)
    batch = UnpairedLogps(logp_B, zeros, torch.tensor([True, False]), torch.tensor([2.0, 0.0]).double(), zeros)

    def kto(batch: UnpairedLogps) -> list[float]:
        values: list[float] = build("kto", beta=0.5, lambda_d=2.0, lambda_u=3.0).per_response(batch).tolist()
        return values

    assert kto(batch) == pytest.approx([2 / (1 + math.e), 3 / (1 + math.e)], rel=1e-12)
    below = replace(batch, kl_logp_M=torch.tensor([-5.0, 1.0]).double())
    nothing = replace(batch, kl_logp_M=zeros[:0], kl_ref_logp_M=zeros[:0])
    for case in (below, nothing):
        assert kto(case) == pytest.approx([2 / (1 + math.exp(1.5)), 3 / (1 + math.exp(0.5))], rel=1e-12)


def test_the_reference_point_of_kto_has_no_gradient() -> None:
    kl_M = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    logp_B = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    fixed = torch.zeros(1, dtype=torch.float64)
    build("kto").per_response(UnpairedLogps(logp_B, fixed, torch.tensor([True]), kl_M, fixed)).sum().backward()
    assert kl_M.grad is None
    assert logp_B.grad is not None


@given(st.lists(st.floats(-40, -1), min_size=2, max_size=2), st.floats(0.1, 4.0))
def test_pro_with_two_responses_is_a_sigmoid(logps: list[float], gap: float) -> None:
    # -log s((r1 - r2)(s1 - s2)) on means of 4 tokens, plus w times the NLL of the best.
    loss = build("pro", sft_weight=0.25).of_list(ranked(logps, [1, 2], [gap, 0.0], tokens=4))
    apart = gap * (logps[0] - logps[1]) / 4
    assert float(loss) == pytest.approx(math.log1p(math.exp(-apart)) - 0.25 * logps[0], rel=1e-9)


def test_pro_skips_equal_rewards() -> None:
    tied = ranked([-4.0, -6.0, -9.0], [1, 1, 2], [2.0, 2.0, 1.0])
    tied.logp_K.requires_grad_()
    # The two best compete with the third alone, at a gap of 1; w (3 - 1)^2 times the mean of their NLL.
    wanted = math.log1p(math.exp(-5)) + math.log1p(math.exp(-3)) + 0.05 * 4 * 5
    loss = build("pro").of_list(tied)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-12)
    assert torch.isfinite(tied.logp_K.grad).all()  # type: ignore[arg-type]
    assert float(build("pro", sft_weight=0.0).of_list(ranked([-4.0, -6.0], [1, 1]))) == 0.0


@pytest.mark.parametrize(("list_loss", "pair_loss", "parameters"), [("plackett_luce", "dpo", {"beta": 0.3})])
def test_a_list_of_two_is_a_pair(list_loss: str, pair_loss: str, parameters: dict[str, Any]) -> None:
    as_list = build(list_loss, **parameters).of_list(ranked([-7.0, -3.0], [2, 1]))
    as_pair = build(pair_loss, **parameters).per_pair(pair(-3.0, -7.0))
    torch.testing.assert_close(as_list, as_pair.squeeze(), rtol=1e-12, atol=1e-12)


def test_plackett_luce_of_equal_scores_counts_the_orders() -> None:
    # All scores equal: every order of 4 has probability 1/24; ties do not compete: (1/3)(1/3) for two, then two.
    assert float(build("plackett_luce").of_list(ranked([0.0] * 4, [3, 1, 2, 4]))) == pytest.approx(
        math.log(24), rel=1e-12
    )
    assert float(build("plackett_luce").of_list(ranked([0.0] * 4, [1, 1, 2, 2]))) == pytest.approx(
        math.log(9), rel=1e-12
    )


def test_rrhf_by_hand() -> None:
    # Means -2, -1, -3 with ranks 1, 2, 3: only the second leads one that is better, by 1; the best costs 4.
    assert float(build("rrhf").of_list(ranked([-4.0, -2.0, -6.0], [1, 2, 3], tokens=2))) == 5.0
    assert float(build("rrhf", rank_coef=100.0).of_list(ranked([-4.0, -2.0, -6.0], [1, 2, 3], tokens=2))) == 104.0
    assert float(build("rrhf").of_list(ranked([-4.0, -2.0], [1, 1]))) == 3.0  # tied: no order, the mean of both


SLIC = [
    # lp 0, 1, -1 with ranks 1, 2, 3 and rewards 3, 2, 0; leads of i over j: -1, 1, 2.
    ("rank", 1.0, (2 + 0 + 0) / 3), ("margin", 1.0, (2 + 2 + 0) / 3), ("list", 1.0, 2 + 1 + 0),
    ("reward", 1.0, -(3 + 2 * math.e) / (1 + math.e + 1 / math.e)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "delta", "calibration"), SLIC)
def test_slic_by_hand(kind: str, delta: float, calibration: float) -> None:
    batch = ranked([0.0, 1.0, -1.0], [1, 2, 3], [3.0, 2.0, 0.0])
    loss = build("slic", kind=kind, delta=delta, reg="none")
    assert not loss.needs_reference
    assert float(loss.of_list(batch)) == pytest.approx(calibration, rel=1e-12)
    with_kl = build("slic", kind=kind, delta=delta, reg="kl", lam=0.5)
    assert with_kl.needs_reference
    assert with_kl.needs_target_kl
    assert float(with_kl.of_list(replace(batch, target_kl=torch.tensor(3.0)))) == pytest.approx(calibration + 1.5)
    with pytest.raises(ValueError, match="was not given"):
        with_kl.of_list(batch)


def test_slic_on_pairs() -> None:
    loss = build("slic", delta=2.0, lam=0.5)
    batch = pair(-4.0, -5.0)
    assert loss.per_pair(batch).tolist() == [3.0]  # (2 - 1) + 4 / 2
    torch.testing.assert_close(loss.per_pair(batch)[0], loss.of_list(ranked([-5.0, -4.0], [2, 1])))
    with pytest.raises(ValueError, match="needs rewards"):
        build("slic", kind="margin").per_pair(batch)
