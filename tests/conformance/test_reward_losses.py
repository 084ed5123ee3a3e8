"""What every reward loss must do, over the whole table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from torch import Tensor

from pipeline_lib.errors import ConfigError
from pipeline_lib.losses.reward import REWARD_LOSSES

every_loss = pytest.mark.parametrize("name", list(REWARD_LOSSES))


def build(name: str, **parameters: Any) -> Any:
    return REWARD_LOSSES.build({"name": name, **parameters})


def scores(num: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_loss
def test_contract(name: str) -> None:
    loss = build(name)
    assert isinstance(loss, BaseModel)
    assert type(loss).model_config["frozen"] is True
    assert name == type(loss).__module__.rpartition(".")[2]
    assert name.replace("_", "") == type(loss).__name__.lower()
    assert "Source:" in (type(loss).__doc__ or "")
    for field_name, field in type(loss).model_fields.items():
        assert field.description, f"{name}.{field_name} has no description"
        for bad in ("a text", float("nan"), None):
            with pytest.raises(ConfigError, match=field_name):
                build(name, **{field_name: bad})


@every_loss
def test_the_first_step_raises_the_best_and_lowers_the_worst(name: str) -> None:
    scores_K = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    build(name).of_prompt(scores_K, torch.tensor([2, 1, 4, 3]))[0].backward()
    assert scores_K.grad is not None
    assert scores_K.grad[1] < 0 < scores_K.grad[2]


@every_loss
def test_two_responses_are_a_bradley_terry_pair(name: str) -> None:
    loss, weight = build(name, centring=0.02).of_prompt(torch.tensor([1.5, -0.5]).double(), torch.tensor([2, 1]))
    # ln(1 + e^2) + 0.02 (1.5 - 0.5)^2
    assert float(loss) == pytest.approx(2.1269280110429725 + 0.02, rel=1e-12)
    assert weight == 1


@every_loss
@given(data=st.data())
def test_the_order_of_responses_does_not_matter(name: str, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    order = data.draw(st.permutations(range(len(ranks))))
    scores_K, rank_K = scores(len(ranks)), torch.tensor(ranks)
    loss = build(name, centring=0.01)
    straight = loss.of_prompt(scores_K, rank_K, weight=2.0)
    shuffled = loss.of_prompt(scores_K[list(order)], rank_K[list(order)], weight=2.0)
    torch.testing.assert_close(shuffled[0], straight[0], rtol=1e-12, atol=1e-12)
    assert shuffled[1] == straight[1]


@every_loss
def test_only_the_order_of_ranks_counts(name: str) -> None:
    loss = build(name)
    one = loss.of_prompt(scores(4), torch.tensor([2, 1, 3, 2]))
    other = loss.of_prompt(scores(4), torch.tensor([20, -1, 31, 20]))
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]


@every_loss
def test_a_prompt_of_ties_teaches_nothing(name: str) -> None:
    scores_K = scores(3).requires_grad_()
    loss, weight = build(name).of_prompt(scores_K, torch.tensor([1, 1, 1]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores_K.grad is not None
    assert scores_K.grad.tolist() == [0.0, 0.0, 0.0]
    assert weight == (1.0 if name == "kwise" else 0.0)  # K-wise: C(K, 2) as printed


@every_loss
def test_gradient_is_the_derivative(name: str) -> None:
    def loss(scores_K: Tensor) -> Tensor:
        return build(name, centring=0.01).of_prompt(scores_K, torch.tensor([2, 1, 3, 2]), weight=0.7)[0]

    assert torch.autograd.gradcheck(loss, (scores(4).requires_grad_(),))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_are_finite_and_keep_their_format(name: str, dtype: torch.dtype) -> None:
    scores_K = torch.tensor([1e6, -1e6, 0.0], dtype=dtype, requires_grad=True)
    loss, _ = build(name).of_prompt(scores_K, torch.tensor([3, 1, 2]))
    loss.backward()
    assert loss.dtype == dtype
    assert torch.isfinite(loss)
    assert scores_K.grad is not None
    assert torch.isfinite(scores_K.grad).all()


@every_loss
def test_what_is_no_list_is_refused(name: str) -> None:
    for shape, ranks in (((3,), [1, 2]), ((1,), [1]), ((1, 2), [[1, 2]])):
        with pytest.raises(ValueError, match=r"must be \(K,\)"):
            build(name).of_prompt(torch.zeros(shape), torch.tensor(ranks))


def test_margins_by_strength() -> None:
    better_P, worse_P = scores(5, 1), scores(5, 2)
    for margins, wanted in (
        ("none", [0.0] * 5),
        ("small", [1.0, 2 / 3, 1 / 3, 0.0, 0.0]),
        ("large", [3.0, 2.0, 1.0, 0.0, 0.0]),
    ):
        loss = build("bradley_terry", margins=margins)
        strengths = ["significantly", "better", "slightly", "unsure", None]
        assert [loss.margin(strength) for strength in strengths] == wanted
        together = loss.per_pair(better_P, worse_P, margin_P=torch.tensor(wanted, dtype=torch.float64))
        for place, strength in enumerate(strengths):
            pair = torch.stack([better_P[place], worse_P[place]])
            alone, _ = loss.of_prompt(pair, torch.tensor([1, 2]), strength=strength)
            torch.testing.assert_close(together[place], alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="strength 'much' is none of significantly, better, slightly, unsure"):
        build("kwise", margins="small").of_prompt(scores(2), torch.tensor([1, 2]), strength="much")


def test_kwise_against_a_loop_over_comparisons() -> None:
    scores_K, ranks = scores(5), [3, 1, 2, 3, 5]
    total = torch.zeros((), dtype=torch.float64)
    valid = 0
    for i in range(5):
        for j in range(i + 1, 5):
            if ranks[i] != ranks[j]:
                winner, loser = (i, j) if ranks[i] < ranks[j] else (j, i)
                total -= torch.log(1 / (1 + torch.exp(scores_K[loser] - scores_K[winner])))
                valid += 1
    assert valid == 9  # one tie among C(5, 2) = 10
    for divisor, pairs in (("all", 10), ("valid", 9)):
        loss, weight = build("kwise", divisor=divisor).of_prompt(scores_K, torch.tensor(ranks), weight=3.0)
        torch.testing.assert_close(loss, 3 * total / pairs, rtol=1e-12, atol=1e-12)
        assert weight == 3.0
