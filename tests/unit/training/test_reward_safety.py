"""The safety loss beside the loss on comparisons: a step by hand, any cut into forwards, and what it teaches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline_lib.errors import DataError
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.reward.safety import Safety
from pipeline_lib.models.scoring import response_scores
from pipeline_lib.schema import Record
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipes.reward import Label, RewardRecipe
from tests.toy import World, encoder, layout, record, reward_model_of, settings

SAFETY = Safety(coef=2.0)
ROWS = [
    record("one", "good", "bad"), record("two", "fine", "awful", "dreadful"), record("three", "x", "y"),
    record("four", "nobody", "knows"),
]  # fmt: skip
TAGS = [("best-safe",), ("all-safe",), ("none-safe",), ()]
IS_SAFE = [(True, False), (True, True, True), (False, False), ()]
WEIGHTS = [1.0, 0.5, 2.0, 1.0]


def tagged(row: Record, tags: tuple[str, ...], weight: float) -> Record:
    return row.model_copy(update={"tags": tags, "weight": weight})


def recipe_of(directory: Path, *, safety: Safety | None = SAFETY, tokens_per_batch: int = 4096) -> RewardRecipe:
    chosen = settings(batch_size=len(ROWS), epochs=30, optimizer={"learning_rate": 5e-3})
    rows = [tagged(*each) for each in zip(ROWS, TAGS, WEIGHTS, strict=True)]
    return RewardRecipe(
        reward_model_of(directory, chosen), DataPlan.of([encoder().tree(row) for row in rows], chosen),
        layout(tokens_per_batch=tokens_per_batch), objective=REWARD_LOSSES.build({"name": "bradley_terry"}),
        labels={row.id: Label.of(row, safety) for row in rows}, safety=safety,
    )  # fmt: skip


def loss_of(recipe: RewardRecipe) -> tuple[float, int]:
    batches = recipe.micro_batches(0)
    return sum(recipe.loss(batch, batches).loss.item() for batch in batches), len(batches)


def scores_of(recipe: RewardRecipe) -> list[list[float]]:
    found = response_scores(recipe.reward_model.model, recipe.plan.trees, layout())
    return [found[row.id] for row in ROWS]


def test_labels_come_from_tags() -> None:
    for row, tags, weight, is_safe in zip(ROWS, TAGS, WEIGHTS, IS_SAFE, strict=True):
        assert Label.of(tagged(row, tags, weight), SAFETY) == Label(row.ranks, None, weight, is_safe)
        assert Label.of(tagged(row, tags, weight)).is_safe == ()


def test_a_row_whose_tags_contradict_each_other_is_named() -> None:
    row = tagged(ROWS[0], ("all-safe", "none-safe"), 1.0)
    with pytest.raises(
        DataError, match=r"row [0-9a-f]{12} \(toy.jsonl:7\): the tags all-safe, none-safe say two things"
    ):
        Label.of(row, SAFETY)


def test_a_step_by_hand(directory: Path) -> None:
    """coef * sum of weight * cross-entropy over labelled responses / sum of their weights, beside the pairs' mean."""
    plain, _ = loss_of(recipe_of(directory, safety=None))
    found, _ = loss_of(recipe_of(directory))
    total = divisor = 0.0
    for scores, is_safe, weight in zip(scores_of(recipe_of(directory)), IS_SAFE, WEIGHTS, strict=True):
        for score, safe in zip(scores, is_safe, strict=False):
            probability = 1 / (1 + math.exp(-score))
            total -= weight * math.log(probability if safe else 1 - probability)
            divisor += weight
    assert divisor == 2 + 1.5 + 4
    assert found - plain == pytest.approx(2.0 * total / divisor, abs=1e-6)


def test_the_cut_into_forwards_does_not_matter(directory: Path) -> None:
    whole, one = loss_of(recipe_of(directory))
    parts, several = loss_of(recipe_of(directory, tokens_per_batch=40))
    assert one == 1
    assert several > 1
    assert parts == pytest.approx(whole, abs=1e-6)


def test_it_teaches_where_0_is(directory: Path, world: World) -> None:
    recipe = recipe_of(directory)
    series = world.loop(recipe, recipe.plan.settings).run()
    assert series[-1]["safety_accuracy_frac"] == 1.0
    for scores, is_safe in zip(scores_of(recipe)[:3], IS_SAFE[:3], strict=True):
        assert [score > 0 for score in scores] == list(is_safe)


def test_a_step_without_a_labelled_row_has_no_such_loss(directory: Path) -> None:
    recipe = recipe_of(directory)
    recipe.labels = {name: replace(label, is_safe=()) for name, label in recipe.labels.items()}
    found, _ = loss_of(recipe)
    plain, _ = loss_of(recipe_of(directory, safety=None))
    assert found == pytest.approx(plain, abs=1e-7)
    assert torch.isfinite(torch.tensor(found))
