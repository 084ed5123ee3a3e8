"""The reward recipe: losses of a step by hand, exact under accumulation, weights, strength; it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.reward.contract import RewardLoss
from pipeline_lib.models.heads import scores
from pipeline_lib.models.scoring import response_scores
from pipeline_lib.schema import Record
from pipeline_lib.text.pack import pack
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.ranking import RankedPairs
from pipeline_lib.training.recipes.reward import Label, Labels, RewardRecipe
from tests.toy import COMPARISONS, World, encoder, layout, record, reward_model_of, reward_recipe, settings

BRADLEY_TERRY: RewardLoss = REWARD_LOSSES.build({"name": "bradley_terry", "centring": 0.01})
RANKS = ((1, 2, 3), (3, 1, 2), (1, 2, 2), (2, 1, 1), (1, 1, 1), (2, 2, 1), (1, 3, 2), (1, 2, 3))


def labels_of(rows: list[Record], **changes: Any) -> Labels:
    return {row.id: Label(row.ranks, **changes) for row in rows}


def uneven_labels() -> Labels:
    """Every order with ties, weights that differ, a strength now and then."""
    strengths = ("significantly", None, "slightly", "unsure")
    return {
        row.id: Label(ranks, strengths[n % 4], 0.25 * (n + 1))  # type: ignore[arg-type]
        for n, (row, ranks) in enumerate(zip(COMPARISONS, RANKS, strict=True))
    }


def recipe_of(
    directory: Path, rows: list[Record], labels: Labels, objective: RewardLoss = BRADLEY_TERRY, **how: Any
) -> RewardRecipe:
    chosen = settings(batch_size=len(rows))
    trees = [encoder().tree(row) for row in rows]
    return RewardRecipe(
        reward_model_of(directory, chosen), DataPlan.of(trees, chosen), layout(**how),
        objective=objective, labels=labels,
    )  # fmt: skip


def step_of(recipe: RewardRecipe) -> tuple[float, dict[str, Tensor], int]:
    """Return loss, gradients and number of forwards of the first step."""
    batches = recipe.micro_batches(0)
    loss = 0.0
    for batch in batches:
        result = recipe.loss(batch, batches)
        result.loss.backward()
        loss += float(result.loss.detach())
    (group,) = recipe.parameter_groups()
    return loss, {name: value.grad for name, value in group.parameters.items() if value.grad is not None}, len(batches)


def scores_of(recipe: RewardRecipe) -> dict[str, list[float]]:
    """Each tree's scores from a forward of its own."""
    with torch.no_grad():
        return {tree.record_id: scores(recipe.reward_model.model, pack([tree])).tolist() for tree in recipe.plan.trees}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_ranked_pairs_are_all_that_differ_and_no_ties() -> None:
    rows = [record("a", "1", "2", "3"), record("b", "1", "2"), record("c", "1", "2", "3")]
    labels = {rows[0].id: Label((2, 1, 3)), rows[1].id: Label((1, 1)), rows[2].id: Label((2, 1, 1))}
    ranks = {record_id: label.ranks for record_id, label in labels.items()}
    pairs = RankedPairs.of(pack([encoder().tree(row) for row in rows]), ranks)
    assert list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [
        (0, 2), (1, 0), (1, 2), (6, 5), (7, 5),
    ]  # fmt: skip


def test_a_label_is_what_people_said_of_a_record() -> None:
    row = Record.create(
        COMPARISONS[0].messages, COMPARISONS[0].responses, (1, 2, 2), origin=COMPARISONS[0].origin,
        strength="slightly", weight=0.5, tags=("safe",),
    )  # fmt: skip
    assert Label.of(row) == Label((1, 2, 2), "slightly", 0.5)


def test_the_loss_is_the_pair_mean_by_hand(directory: Path) -> None:
    recipe = reward_recipe(directory, settings(batch_size=8), tokens_per_batch=100)
    loss, count = 0.0, 0
    for name, score in scores_of(recipe).items():
        ranks = recipe.labels[name].ranks
        for i, rank_i in enumerate(ranks):
            for j, rank_j in enumerate(ranks):
                if rank_i < rank_j:
                    loss += softplus(score[j] - score[i]) + 0.01 * (score[i] + score[j]) ** 2
                    count += 1
    found, _, num_forwards = step_of(recipe)
    assert num_forwards > 1
    assert count == 4 * 3 + 4 * 2
    assert found == pytest.approx(loss / count, abs=1e-5)


def test_weights_weigh_pairs_and_the_divisor(directory: Path) -> None:
    """sum w l / sum w over pairs: a row of three pairs and weight 3 stands against one of a pair and weight 1."""
    rows = [record("q", "a", "bb", "ccc"), record("other", "x", "yy")]
    labels = {rows[0].id: Label((1, 2, 3), weight=3.0), rows[1].id: Label((2, 1), weight=1.0)}
    recipe = recipe_of(directory, rows, labels, REWARD_LOSSES.build({"name": "bradley_terry"}))
    score = scores_of(recipe)
    a, b, c = score[rows[0].id]
    x, y = score[rows[1].id]
    by_hand = 3 * (softplus(b - a) + softplus(c - a) + softplus(c - b)) + softplus(x - y)
    assert step_of(recipe)[0] == pytest.approx(by_hand / (3 * 3 + 1), abs=1e-5)


@pytest.mark.parametrize("name", list(REWARD_LOSSES))
def test_a_step_is_the_same_in_one_forward_and_in_many(name: str, directory: Path) -> None:
    """Rows of uneven length, ties, weights and strengths; gradients too."""
    objective = REWARD_LOSSES.build({"name": name})
    one, one_grads, _ = step_of(recipe_of(directory, COMPARISONS, uneven_labels(), objective))
    for how in ({"tokens_per_batch": 100}, {"tokens_per_batch": 60}, {"is_packed": False}):
        many, many_grads, num_forwards = step_of(recipe_of(directory, COMPARISONS, uneven_labels(), objective, **how))
        assert num_forwards > 1 or how == {"is_packed": False}
        assert many == pytest.approx(one, abs=1e-6)
        assert many_grads.keys() == one_grads.keys()
        assert max(float((many_grads[key] - one_grads[key]).abs().max()) for key in one_grads) <= 1e-6


def test_the_objective_hears_strength_weight_and_all_scores_at_once(directory: Path) -> None:
    heard: list[tuple[int, list[int], str | None, float]] = []

    @dataclass(frozen=True)
    class Listening:
        def of_prompt(
            self, scores_K: Tensor, rank_K: Tensor, *, strength: str | None = None, weight: float = 1.0
        ) -> tuple[Tensor, float]:
            if scores_K.requires_grad:
                heard.append((scores_K.numel(), rank_K.tolist(), strength, weight))
            return weight * scores_K.sum(), weight

    labels = uneven_labels()
    recipe = recipe_of(directory, COMPARISONS, labels, Listening())
    loss, _, _ = step_of(recipe)
    assert sorted(heard, key=lambda call: call[3]) == [
        (3, list(label.ranks), label.strength, label.weight) for label in labels.values()
    ]
    weighted = sum(labels[name].weight * sum(row) for name, row in scores_of(recipe).items())
    assert loss == pytest.approx(weighted / sum(label.weight for label in labels.values()), abs=1e-5)


def test_figures_count_every_pair_once(directory: Path) -> None:
    recipe = recipe_of(directory, COMPARISONS, uneven_labels())
    score = scores_of(recipe)
    margins = [
        score[name][i] - score[name][j]
        for name, label in recipe.labels.items()
        for i, rank_i in enumerate(label.ranks)
        for j, rank_j in enumerate(label.ranks)
        if rank_i < rank_j
    ]
    (batch,) = recipe.micro_batches(0)
    figures = recipe.loss(batch, [batch]).figures
    assert figures["margin"].count == len(margins) == 4 * 3 + 3 * 2
    assert figures["margin"].total == pytest.approx(sum(margins), abs=1e-4)
    assert figures["accuracy_frac"].total == sum(margin > 0 for margin in margins)
    assert figures["score"].count == 24


def test_a_step_of_nothing_but_ties_is_no_fault(directory: Path) -> None:
    rows = [record(f"q {n}", "a", "b", ranks=(1, 1)) for n in range(2)]
    loss, gradients, _ = step_of(recipe_of(directory, rows, labels_of(rows)))
    assert loss == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients.values())


def answer(n: int) -> str:
    return f"answer {n * 7 % 11}"


KINDS: dict[str, Callable[[int], Record]] = {
    "pairs": lambda n: record(f"q {n}", f"{answer(n)}!", f"{answer(n)}."),
    "rankings": lambda n: record(f"q {n}", f"{answer(n)}!", f"{answer(n)}?", f"{answer(n)}."),
}
"""The better answer ends with an exclamation mark, the worst with a full stop."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_learns_a_separable_preference(kind: str, directory: Path, world: World) -> None:
    train, test = [KINDS[kind](n) for n in range(16)], [KINDS[kind](n) for n in range(100, 110)]
    chosen = settings(batch_size=8, epochs=10, optimizer={"learning_rate": 5e-3})
    trained = reward_model_of(directory, chosen)
    recipe = RewardRecipe(
        trained, DataPlan.of([encoder().tree(row) for row in train], chosen), layout(),
        objective=BRADLEY_TERRY, labels=labels_of(train),
    )  # fmt: skip
    series = world.loop(recipe, chosen).run()
    assert series[-1]["loss"] < 0.3 < series[0]["loss"]
    assert series[-1]["accuracy_frac"] == 1.0
    held_out = response_scores(trained.model, [encoder().tree(row) for row in test], layout())
    assert all(list(row) == sorted(row, reverse=True) for row in held_out.values())
