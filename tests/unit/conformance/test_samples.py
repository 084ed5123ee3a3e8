"""Figures of samples and groups of them, against brute force and other libraries."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import linregress

from pipeline_lib.evaluation.text_metrics import distinct_n, rouge_l
from pipeline_lib.losses.group import grpo_loss, rloo_loss, token_weights
from pipeline_lib.rl.best_of_n import expected_best, kl_nats, pass_at_k
from pipeline_lib.rl.group_advantage import group_normalized, leave_one_out
from pipeline_lib.rl.monitor import distinct_frac, explained_variance, slope
from pipeline_lib.text.bleu import overlap, self_bleu

WORDS = ("the", "cat", "sat", "on", "mat", "a", "dog")
texts = st.lists(st.sampled_from(WORDS), max_size=9)
quick = settings(max_examples=60, deadline=None)


# Best of n -------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.data())
def test_best_of_n_is_the_mean_over_all_subsets(scores: list[float], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(scores)))
    subsets = [max(subset) for subset in combinations(scores, n)]
    assert expected_best(scores, n=n) == pytest.approx(sum(subsets) / len(subsets), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_kl_of_best_of_n_is_the_integral(n: int) -> None:
    """The best of n uniform numbers has the density n u^(n-1); its KL by the trapezoidal rule."""
    assert kl_nats(n) == math.log(n) - (n - 1) / n
    u = torch.linspace(1e-9, 1, 400_001, dtype=torch.float64)
    density = n * u ** (n - 1)
    integral = torch.trapezoid(density * density.clamp(min=1e-300).log(), u).item()
    assert kl_nats(n) == pytest.approx(integral, abs=1e-5)


@pytest.mark.parametrize(("total", "correct", "k"), [(6, 0, 3), (6, 2, 1), (6, 2, 3), (6, 5, 2), (6, 6, 6), (1, 1, 1)])
def test_pass_at_k_over_all_subsets(total: int, correct: int, k: int) -> None:
    outcomes = [any(place < correct for place in subset) for subset in combinations(range(total), k)]
    assert pass_at_k(total, correct, k=k) == pytest.approx(sum(outcomes) / len(outcomes), rel=1e-12)
    assert pass_at_k(total, correct, k=k) == pytest.approx(1 - math.comb(total - correct, k) / math.comb(total, k))


# BLEU, ROUGE, distinct-n -----------------------------------------------------------------------------------


@quick
@given(texts, st.lists(texts.filter(bool), min_size=1, max_size=4))
def test_bleu_is_nltks(hypothesis: list[str], references: list[list[str]]) -> None:
    found = overlap(hypothesis, references)
    smoothed = sentence_bleu(references, hypothesis, smoothing_function=SmoothingFunction().method1)
    assert found.bleu(smoothing=0.1) == pytest.approx(float(smoothed), rel=1e-9, abs=1e-12)
    exact = found.bleu()
    if all(found.matches):
        assert exact == pytest.approx(float(sentence_bleu(references, hypothesis)), rel=1e-9)
    else:
        assert exact == 0.0


@quick
@given(st.lists(texts, min_size=2, max_size=6))
def test_self_bleu_is_the_mean_over_the_others(samples: list[list[str]]) -> None:
    expected = [
        overlap(one, samples[:place] + samples[place + 1 :]).bleu(smoothing=0.1) for place, one in enumerate(samples)
    ]
    assert self_bleu(samples) == pytest.approx(sum(expected) / len(samples), rel=1e-12, abs=1e-15)


def test_self_bleu_at_its_ends() -> None:
    """Methods 4.20: no word in common is exactly 0, despite the smoothing; the same again and again is 1."""
    assert self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) == 0.0
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1.0, rel=1e-12)
    assert self_bleu([[1, 2]]) == self_bleu([]) == 0.0


def test_overlaps_add_up_to_a_corpus() -> None:
    # "the cat sat" against "the cat": 2 of 3 words, 1 of 2 pairs; "a" against "a dog": 1 of 1 word, no pair.
    both = overlap(["the", "cat", "sat"], [["the", "cat"]], max_n=2) + overlap(["a"], [["a", "dog"]], max_n=2)
    assert both.bleu() == pytest.approx(math.sqrt(3 / 4 * 1 / 2), rel=1e-12)
    short = overlap(["a"], [["a", "dog", "sat"]], max_n=1)
    assert short.bleu() == pytest.approx(math.exp(1 - 3 / 1), rel=1e-12)
    with pytest.raises(ValueError, match="needs a reference"):
        overlap(["a"], [])


@quick
@given(texts, texts)
def test_rouge_l_is_the_packages(response: list[str], reference: list[str]) -> None:
    mine, theirs = " ".join(response), " ".join(reference)
    expected = RougeScorer(["rougeL"], use_stemmer=False).score(theirs, mine)["rougeL"].fmeasure
    assert rouge_l(mine, theirs) == pytest.approx(expected, rel=1e-12)


@quick
@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 3))
def test_distinct_n_by_counting(samples: list[list[str]], n: int) -> None:
    pieces = [tuple(one[start : start + n]) for one in samples for start in range(max(0, len(one) - n + 1))]
    share = len(set(pieces)) / len(pieces) if pieces else None
    assert distinct_n((" ".join(one) for one in samples), n) == share
    ids = [[WORDS.index(word) for word in one] for one in samples]
    assert distinct_frac(ids, n) == (1.0 if share is None else share)


# Health ----------------------------------------------------------------------------------------------------


def test_slope_and_explained_variance_against_scipy() -> None:
    draw = random.Random(4)
    x, y = ([draw.gauss(0, 2) for _ in range(30)] for _ in range(2))
    wide_x, wide_y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    assert slope(wide_x, wide_y) == pytest.approx(linregress(x, y).slope, rel=1e-9)
    missed = [b - a for a, b in zip(x, y, strict=True)]

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / len(values)

    assert explained_variance(wide_x, wide_y) == pytest.approx(1 - variance(missed) / variance(y), rel=1e-9)


# Groups ----------------------------------------------------------------------------------------------------


def groups(seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.gauss(0, 2) for _ in range(4)] for _ in range(3)]


def test_advantages_of_groups() -> None:
    rewards = groups(0)
    wide_GK = torch.tensor(rewards, dtype=torch.float64)
    for row, alone, normal in zip(
        rewards, leave_one_out(wide_GK).tolist(), group_normalized(wide_GK, scale="std").tolist(), strict=True
    ):
        mean = sum(row) / 4
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / 3)
        assert alone == pytest.approx([x - (sum(row) - x) / 3 for x in row], rel=1e-9)
        assert normal == pytest.approx([(x - mean) / (deviation + 1e-4) for x in row], rel=1e-9)
    assert group_normalized(wide_GK, scale="none").sum(1).abs().max() < 1e-12
    assert not group_normalized(torch.ones(1, 3), scale="std").any()


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_grpo_with_every_normalisation(norm: str) -> None:
    draw = random.Random(7)
    lengths = [2, 1, 4]
    new, old, kl, advantage = ([[draw.gauss(0, 0.4) for _ in range(n)] for n in lengths] for _ in range(4))
    weight_N = token_weights(torch.tensor(lengths), norm=norm, num_responses=3, num_tokens=7, constant=10)  # type: ignore[arg-type]
    divisor = {"sequence": lambda n: 3 * n, "token": lambda _: 7, "constant": lambda _: 30}[norm]
    expected = 0.0
    for n, *columns in zip(lengths, new, old, kl, advantage, strict=True):
        for lp, lp_old, k, a in zip(*columns, strict=True):
            ratio = math.exp(lp - lp_old)
            expected += (max(-a * ratio, -a * max(0.8, min(1.2, ratio))) + 0.04 * k) / divisor(n)  # type: ignore[no-untyped-call]
    new_N, old_N, kl_N, advantage_N = (
        torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (new, old, kl, advantage)
    )
    found = grpo_loss(new_N, old_N, kl_N, advantage_N, weight_N, beta=0.04, clip_range=0.2)
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-9)
    assert found.kl_loss == pytest.approx(0.04 * (kl_N * weight_N).sum().item(), rel=1e-12)


def test_rloo_where_nothing_moved_is_reinforce() -> None:
    logp_R = torch.tensor([-3.0, -8.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantage_R = torch.tensor([0.5, -1.5, 1.0], dtype=torch.float64)
    found = rloo_loss(logp_R, logp_R.detach(), advantage_R, num_responses=6, clip_range=0.2)
    found.loss_sum.backward()
    assert logp_R.grad is not None
    assert logp_R.grad.tolist() == pytest.approx((-advantage_R / 6).tolist(), rel=1e-12)
