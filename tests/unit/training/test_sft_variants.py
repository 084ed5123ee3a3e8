"""SFT's reductions, smoothing, KL and pretraining text against plain PyTorch on whole logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline_lib.errors import InterruptedRunError
from pipeline_lib.losses.cross_entropy import CrossEntropy, Reduction
from pipeline_lib.text.cloning import ClassEncoder
from pipeline_lib.text.conditions import ClassSettings, HindsightSettings
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.hindsight import HindsightEncoder
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.pretraining import TEXT, PretrainingRows
from pipeline_lib.training.recipes.sft import KlPenalty, SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import OfflineSettings
from tests.toy import (
    COMPARISONS,
    World,
    dialogue,
    encoder,
    furthest,
    layout,
    policy_of,
    record,
    settings,
    sharpen,
    stop_before,
    weights_of,
)

MULTI = encoder().tree(record(dialogue("hi", "yo", "and?", "so it is", "?"), "no"))
ROWS = [
    replace(MULTI, weight=0.5),
    encoder().tree(record("question", "a longer answer to it")),
    replace(encoder().tree(record("q", "a")), weight=2.0),
]
TEXTS = PretrainingRows(
    tuple(Tree(f"{TEXT}{n}", (2,), (tuple(range(10 + n, 20 + 2 * n)),), (False,)) for n in range(5)),
    coef=0.25, rows_per_step=3, seed=1,
)  # fmt: skip


def recipe_of(directory: Path, chosen: OfflineSettings, trees: list[Tree], **how: Any) -> SftRecipe:
    kept = {name: how.pop(name) for name in ("tokens_per_batch", "is_packed") if name in how}
    policy = policy_of(directory, chosen)
    sharpen(policy.model, 2.0)
    kl_coef = how.pop("kl_coef", 0.0)
    kl = KlPenalty(kl_coef, Reference.of(policy)) if kl_coef else None
    return SftRecipe(policy, DataPlan.of(trees, chosen), layout(**kept), kl=kl, **how)


def step_loss(recipe: SftRecipe, step: int = 0) -> Tensor:
    """The loss of a whole step with its gradient in the parameters."""
    batches = recipe.micro_batches(step)
    losses = [recipe.loss(batch, batches).loss for batch in batches]
    for loss in losses:
        loss.backward()
    return torch.stack([loss.detach() for loss in losses]).sum()


def labels_of(tree: Tree) -> tuple[Tensor, Tensor]:
    """A row as PyTorch's users write it: ids, and labels with -100 where nothing counts."""
    ids = torch.tensor([*tree.prompt_ids, *tree.response_ids[0]])
    counts = torch.tensor([*tree.prompt_counts, *[True] * len(tree.response_ids[0])])
    return ids, torch.where(counts, ids, -100)


def token_losses(recipe: SftRecipe, tree: Tree, smoothing: float = 0.0) -> Tensor:
    """PyTorch's cross-entropy of a row's counted tokens, from the full logits."""
    ids, labels = labels_of(tree)
    logits = recipe.policy.model(ids[None]).logits[0]
    losses = functional.cross_entropy(logits[:-1], labels[1:], reduction="none", label_smoothing=smoothing)
    return losses[labels[1:] != -100]


def by_turn(losses: Tensor) -> Tensor:
    """The turn means of the multi-turn row: "yo", "so it is" and "no", each with its end."""
    return torch.stack([part.mean() for part in losses.split([3, 9, 3])])


EXPECTED: dict[Reduction, Callable[[list[Tensor]], Tensor]] = {
    "token_mean": lambda rows: (
        (0.5 * rows[0].sum() + rows[1].sum() + 2 * rows[2].sum())
        / (0.5 * rows[0].numel() + rows[1].numel() + 2 * rows[2].numel())
    ),
    "sample_mean": lambda rows: (0.5 * rows[0].mean() + rows[1].mean() + 2 * rows[2].mean()) / 3.5,
    "turn_mean": lambda rows: (0.5 * by_turn(rows[0]).sum() + rows[1].mean() + 2 * rows[2].mean()) / (1.5 + 1 + 2),
    "sum": lambda rows: 0.5 * rows[0].sum() + rows[1].sum() + 2 * rows[2].sum(),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", EXPECTED)
def test_every_reduction_is_that_of_torch_with_its_gradient(
    reduction: Reduction, smoothing: float, directory: Path
) -> None:
    chosen = settings(batch_size=3, adapter=None)
    objective = CrossEntropy(reduction=reduction, label_smoothing=smoothing)
    recipe = recipe_of(directory, chosen, ROWS, objective=objective)
    assert MULTI.counted_turns == (3, 9, 3)
    found = step_loss(recipe)
    parameters = dict(recipe.policy.model.named_parameters())
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}
    recipe.policy.model.zero_grad()
    expected = EXPECTED[reduction]([token_losses(recipe, tree, smoothing) for tree in ROWS])
    expected.backward()
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(gradients) == len(parameters)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5 * float(expected.detach())), name


@pytest.mark.parametrize("reduction", EXPECTED)
def test_one_forward_is_many_forwards(reduction: Reduction, directory: Path, tmp_path: Path) -> None:
    """With smoothing, KL and pretraining text: packed, padded and split steps train to the same weights."""
    chosen = settings(batch_size=3, epochs=3, optimizer={"learning_rate": 1e-4})
    objective = CrossEntropy(reduction=reduction, label_smoothing=0.1)
    trained = []
    for number, how in enumerate(({}, {"tokens_per_batch": 16}, {"is_packed": False, "tokens_per_batch": 60})):
        recipe = recipe_of(directory, chosen, ROWS, objective=objective, kl_coef=0.5, pretraining=TEXTS, **how)
        assert len(recipe.micro_batches(0)) == (2, 6, 4)[number]
        World.at(tmp_path / str(number)).loop(recipe, chosen).run()
        trained.append(weights_of(recipe))
    assert furthest(trained[0], trained[1]) < 1e-5
    assert furthest(trained[0], trained[2]) < 1e-5


def test_the_kl_is_zero_at_the_start_and_that_of_the_whole_distribution_later(directory: Path, world: World) -> None:
    chosen = settings(batch_size=3, epochs=4, optimizer={"learning_rate": 1e-2})
    recipe = recipe_of(directory, chosen, ROWS, kl_coef=0.5)
    batches = recipe.micro_batches(0)
    assert recipe.loss(batches[0], batches).figures["kl_per_token_nats"].mean == pytest.approx(0.0, abs=1e-6)
    world.loop(recipe, chosen).run()
    (batch,) = batches = recipe.micro_batches(0)
    found = recipe.loss(batch, batches)
    kl, nll, weight = 0.0, 0.0, 0.0
    with torch.no_grad():
        for tree in ROWS:
            ids, labels = labels_of(tree)
            kept = labels[1:] != -100
            logp = torch.log_softmax(recipe.policy.model(ids[None]).logits[0, :-1], dim=-1)[kept]
            assert recipe.kl is not None
            with recipe.kl.reference.active() as reference:
                ref_logp = torch.log_softmax(reference(ids[None]).logits[0, :-1], dim=-1)[kept]
            kl += tree.weight * float((logp.exp() * (logp - ref_logp)).sum())
            nll += tree.weight * float(token_losses(recipe, tree).sum())
            weight += tree.weight * int(kept.sum())
    assert kl / weight > 1e-3
    assert float(found.loss.detach()) == pytest.approx((nll + 0.5 * kl) / weight, rel=1e-4)


def test_a_strong_kl_keeps_the_model_near(directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=3, epochs=15, optimizer={"learning_rate": 5e-3})
    nearness = []
    for number, kl_coef in enumerate((1e-6, 20.0)):
        recipe = recipe_of(directory, chosen, ROWS, kl_coef=kl_coef)
        series = World.at(tmp_path / str(number)).loop(recipe, chosen).run()
        nearness.append(series[-1]["kl_per_token_nats"])
    assert nearness[1] < 0.25 * nearness[0]


def test_pretraining_text_has_a_mean_of_its_own(directory: Path) -> None:
    chosen = settings(batch_size=3)
    recipe = recipe_of(directory, chosen, ROWS, pretraining=TEXTS)
    texts = TEXTS.rows(0)
    assert len(texts) == 3
    with torch.no_grad():
        own = EXPECTED["token_mean"]([token_losses(recipe, tree) for tree in ROWS])
        losses = torch.cat([token_losses(recipe, tree) for tree in texts])
    assert losses.numel() == sum(len(tree.response_ids[0]) for tree in texts)
    assert float(step_loss(recipe)) == pytest.approx(float(own + 0.25 * losses.mean()), rel=1e-5)
    batches = recipe.micro_batches(0)
    figures = [recipe.loss(batch, batches).figures for batch in batches]
    assert figures[-1]["pretraining_nll_per_token_nats"].mean == pytest.approx(float(losses.mean()), rel=1e-5)
    assert figures[0]["tokens"].mean == 15 + 22 + 2


def test_pieces_of_text_come_equally_often_in_a_new_order() -> None:
    taken = [[tree.record_id for tree in TEXTS.rows(step)] for step in range(10)]
    flat = [name for step in taken for name in step]
    assert Counter(flat) == {f"{TEXT}{n}": 6 for n in range(5)}
    assert flat[:5] != flat[5:10]
    assert taken == [[tree.record_id for tree in TEXTS.rows(step)] for step in range(10)]


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=2, epochs=2, optimizer={"schedule": "cosine"})
    objective = CrossEntropy(reduction="sample_mean", label_smoothing=0.1)
    how = {"objective": objective, "kl_coef": 0.5, "pretraining": TEXTS}
    whole = recipe_of(directory, chosen, ROWS, **how)
    series = World.at(tmp_path / "whole").loop(whole, chosen).run()
    world = World.at(tmp_path / "stopped")
    for stop in (1, 3):
        loop = world.loop(recipe_of(directory, chosen, ROWS, **how), chosen)
        world.should_stop = stop_before(stop, loop)
        with pytest.raises(InterruptedRunError):
            loop.run()
    world.should_stop = lambda: False
    resumed = recipe_of(directory, chosen, ROWS, **how)
    assert world.loop(resumed, chosen).run() == series
    assert furthest(weights_of(whole), weights_of(resumed)) == 0.0


def test_texts_of_one_comparison_are_held_out_together() -> None:
    made = HindsightEncoder.of(encoder(max_prompt_tokens=1000), HindsightSettings())
    trees = [tree for row in COMPARISONS for tree in made.trees(row)]
    chosen = settings(early_stopping={"held_out_frac": 0.25})
    plan = DataPlan.of(trees, chosen)
    held_out = {tree.record_id.split(":")[0] for tree in plan.held_out}
    assert len(held_out) == 2
    assert len(plan.held_out) == 8
    assert held_out.isdisjoint(tree.record_id.split(":")[0] for tree in plan.trees)


def test_the_hindsight_loss_is_a_mean_of_row_means(directory: Path) -> None:
    made = HindsightEncoder.of(encoder(max_prompt_tokens=1000), HindsightSettings())
    trees = made.trees(COMPARISONS[1])
    recipe = recipe_of(directory, settings(batch_size=4), trees, objective=CrossEntropy(reduction="sample_mean"))
    with torch.no_grad():
        rows = [token_losses(recipe, tree).mean() for tree in trees]
    assert len(rows) == 4
    assert float(step_loss(recipe)) == pytest.approx(float(sum(rows)) / 4, rel=1e-5)


def test_the_class_weighted_loss_over_the_global_batch(directory: Path) -> None:
    """sum(w CE) / sum(w), and with a sequence weight that of w over each turn's length."""
    made = ClassEncoder.of(encoder(), ClassSettings())
    trees = [tree for row in COMPARISONS[:2] for tree in made.trees(row)]
    weights = [1.0, 0.1, 0.1] * 2
    for reduction in ("token_mean", "turn_mean"):
        objective = CrossEntropy(reduction=reduction)
        recipe = recipe_of(directory, settings(batch_size=6), trees, objective=objective, tokens_per_batch=80)
        assert len(recipe.micro_batches(0)) > 1
        above, below = 0.0, 0.0
        with torch.no_grad():
            for weight, tree in zip(weights, trees, strict=True):
                losses = token_losses(recipe, tree)
                each = weight / losses.numel() if reduction == "turn_mean" else weight
                above += each * float(losses.sum())
                below += each * losses.numel()
        assert float(step_loss(recipe)) == pytest.approx(above / below, rel=1e-5)


def test_good_and_bad_answers_are_told_apart_by_their_markers(directory: Path, world: World) -> None:
    """After training, the good answer is likelier behind the good marker, the bad one behind the bad."""
    made = HindsightEncoder.of(encoder(max_prompt_tokens=1000), HindsightSettings(kinds=("p", "n"), layout="plain"))
    rows = [record(f"q{n}", "yes yes yes", "no no no") for n in range(4)]
    trees = [tree for row in rows for tree in made.trees(row)]
    chosen = settings(batch_size=8, epochs=40, adapter=None, optimizer={"learning_rate": 3e-3})
    recipe = recipe_of(directory, chosen, trees, objective=CrossEntropy(reduction="sample_mean"))
    series = world.loop(recipe, chosen).run()
    assert series[-1]["nll_per_token_nats"] < 0.3 * series[0]["nll_per_token_nats"]
    good, bad = (encoder_.tree(record("q9", "yes yes yes")) for encoder_ in made.marked[0])
    with torch.no_grad():
        assert token_losses(recipe, good).sum() + 1 < token_losses(recipe, bad).sum()
