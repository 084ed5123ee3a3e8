"""The loop: the same weights however a step is cut into forwards, and schedule, guards and series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline_lib.errors import DivergedError, InterruptedRunError
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch, pack
from pipeline_lib.training.optimizer import learning_rate_at
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import ParameterGroup, Recipe, StepLoss
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.settings import OptimizerSettings, TrainingSettings
from tests.toy import (
    ANSWERS,
    DEMONSTRATIONS,
    RECIPES,
    World,
    furthest,
    layout,
    policy_of,
    settings,
    sft_recipe,
    weights_of,
)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("is_packed", [True, False])
def test_one_forward_of_eight_is_eight_forwards_of_one(
    kind: str, is_packed: bool, directory: Path, tmp_path: Path
) -> None:
    # Epsilon is above rounding noise: else AdamW makes whole steps of gradients that are 0 but for noise.
    chosen = settings(batch_size=8, epochs=3, optimizer={"epsilon": 1e-5})
    found, forwards = [], []
    for tokens in (4096, 16):
        recipe = RECIPES[kind](directory, chosen, tokens_per_batch=tokens, is_packed=is_packed)
        forwards.append(len(recipe.micro_batches(0)))
        series = World.at(tmp_path / str(tokens)).loop(recipe, chosen).run()
        found.append((weights_of(recipe), series))
    assert forwards == [1, 8]
    assert furthest(found[0][0], found[1][0]) <= 1e-5
    for one, other in zip(found[0][1], found[1][1], strict=True):
        if kind == "dpo" and one["step"] == 0:
            one["accuracy_frac"] = other["accuracy_frac"]  # all margins are 0 there, but for rounding
        assert one == pytest.approx(other, abs=1e-4)
    start = weights_of(RECIPES[kind](directory, chosen))
    assert furthest(found[0][0], start) > 1e-3, "something must have been trained"


def test_packed_and_padded_train_the_same(directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=8, epochs=3, optimizer={"epsilon": 1e-5})
    found = []
    for is_packed in (True, False):
        recipe = sft_recipe(directory, chosen, is_packed=is_packed)
        World.at(tmp_path / str(is_packed)).loop(recipe, chosen).run()
        found.append(weights_of(recipe))
    assert furthest(*found) <= 1e-5


def test_the_loss_is_the_token_mean_over_the_step(directory: Path, world: World) -> None:
    chosen = settings(batch_size=8)
    recipe = sft_recipe(directory, chosen, tokens_per_batch=60)
    with torch.no_grad():
        nll_N = -token_logps(recipe.policy.model, pack(DEMONSTRATIONS)).token_logp_N
    series = world.loop(recipe, chosen).run()
    assert series[0]["loss"] == pytest.approx(float(nll_N.mean()), abs=1e-5)
    assert series[0]["nll_per_token_nats"] == pytest.approx(series[0]["loss"], abs=1e-6)
    assert series[0]["tokens"] == sum(len(text) + 1 for text in ANSWERS)


def test_the_series_is_complete_and_told(directory: Path, world: World) -> None:
    chosen = settings(batch_size=3, epochs=2)
    series = world.loop(sft_recipe(directory, chosen), chosen).run()
    assert [row["step"] for row in series] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in world.told] == [0, 1, 2, 3, 4, 5]
    assert all({"loss", "grad_norm_policy", "learning_rate", "tokens"} <= row.keys() for row in series)
    assert [{"step": step, **figures} for step, figures in world.told] == series
    assert world.texts[-1].startswith("step 6/6, loss ")
    assert world.checkpoints.steps == []


def test_sft_learns(directory: Path, world: World) -> None:
    chosen = settings(batch_size=8, epochs=15, adapter=None, optimizer={"learning_rate": 1e-2})
    series = world.loop(sft_recipe(directory, chosen), chosen).run()
    assert series[-1]["loss"] < 0.6 * series[0]["loss"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        # 0.1 + 0.9 (1 + cos(pi n / 8)) / 2
        ("cosine", [0.5, 1.0, 1.0, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    chosen = OptimizerSettings.model_validate({"schedule": schedule, "warmup_frac": 0.2, "final_frac": 0.1})
    found = [learning_rate_at(step, 10, chosen) for step in range(10)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_one_step_and_no_warmup_have_the_full_rate() -> None:
    assert learning_rate_at(0, 1, OptimizerSettings(warmup_frac=0.0)) == 1.0
    assert learning_rate_at(0, 1, OptimizerSettings(warmup_frac=1.0)) == 1.0


def test_the_schedule_is_applied(directory: Path, world: World) -> None:
    chosen = settings(batch_size=2, optimizer={"learning_rate": 0.004, "schedule": "linear", "warmup_frac": 0.5})
    series = world.loop(sft_recipe(directory, chosen), chosen).run()
    assert [row["learning_rate"] for row in series] == pytest.approx([0.002, 0.004, 0.004, 0.002])


def test_gradients_are_clipped_to_the_norm(directory: Path, world: World) -> None:
    """One AdamW step of huge epsilon is lr / epsilon times the (clipped) gradient: read it from there."""
    chosen = settings(batch_size=8, optimizer={"epsilon": 1e6, "max_grad_norm": 0.01, "learning_rate": 1.0})
    recipe = sft_recipe(directory, chosen)
    before = weights_of(recipe)
    (row,) = world.loop(recipe, chosen).run()
    assert row["grad_norm_policy"] > 0.1, "the norm told is the one before clipping"
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights_of(recipe).items()])
    assert float(moved.norm()) * 1e6 == pytest.approx(0.01, rel=1e-2)


class Broken(SftRecipe):
    """An SFT recipe whose loss can be made useless."""

    factor = 1.0
    from_step = 0

    def micro_batches(self, step: int) -> Sequence[TreeBatch]:
        self.step = step
        return super().micro_batches(step)

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        result = super().loss(batch, step_batches)
        factor = self.factor if self.step >= self.from_step else 1.0
        return StepLoss(result.loss * factor, result.figures)


def broken(directory: Path, chosen: TrainingSettings, factor: float, *, from_step: int = 0) -> Broken:
    recipe = Broken(policy_of(directory, chosen), DataPlan.of(DEMONSTRATIONS, chosen), layout(tokens_per_batch=40))
    recipe.factor, recipe.from_step = factor, from_step
    return recipe


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_names_step_and_rows(factor: float, directory: Path, world: World) -> None:
    chosen = settings(batch_size=2, epochs=2)
    recipe = broken(directory, chosen, factor, from_step=1)
    before_it = recipe.plan.rows(1)
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf|-inf) at step 1") as caught:
        world.loop(recipe, chosen).run()
    named = caught.value.cause.partition("rows of the step: ")[2].split(", ")
    assert set(named) <= {tree.record_id[:12] for tree in before_it}
    assert named
    assert len(world.told) == 1


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(directory: Path, world: World) -> None:
    chosen = settings(batch_size=8)
    recipe = sft_recipe(directory, chosen)
    before = weights_of(recipe)
    parameter = next(iter(recipe.parameter_groups()[0].parameters.values()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match="the gradient norm of policy is nan at step 0"):
        world.loop(recipe, chosen).run()
    assert furthest(weights_of(recipe), before) == 0.0


def test_a_gradient_of_zero_at_the_first_step_stops(directory: Path, world: World) -> None:
    chosen = settings(batch_size=2)
    with pytest.raises(DivergedError, match="the gradient is 0 at step 0: nothing is trained"):
        world.loop(broken(directory, chosen, 0.0), chosen).run()


def test_a_gradient_of_zero_later_is_no_fault(directory: Path, world: World) -> None:
    chosen = settings(batch_size=2)
    assert len(world.loop(broken(directory, chosen, 0.0, from_step=1), chosen).run()) == 4


def test_weights_that_are_not_finite_are_not_handed_on(directory: Path, world: World) -> None:
    """They stop the step that made them, named with its rows, before a checkpoint holds them."""
    chosen = settings(batch_size=2)
    recipe = sft_recipe(directory, chosen)
    name, parameter = next(iter(recipe.parameter_groups()[0].parameters.items()))
    loop = world.loop(recipe, chosen, every_s=0.0)

    def spoil(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if len(world.told) == 1:
            with torch.no_grad():
                parameter.view(-1)[0] = float("inf")

    loop.optimizer.register_step_post_hook(spoil)
    with pytest.raises(DivergedError, match=f"the weights of policy/{name} are not finite after step 1") as caught:
        loop.run()
    assert caught.value.row_ids == tuple(tree.record_id for tree in recipe.plan.rows(1))
    assert world.checkpoints.steps == [1]


def test_nothing_to_train_is_an_error_of_ours(directory: Path, world: World) -> None:
    class Frozen(SftRecipe):
        def parameter_groups(self) -> Sequence[ParameterGroup]:
            self.policy.model.requires_grad_(requires_grad=False)
            return super().parameter_groups()

    chosen = settings()
    recipe = Frozen(policy_of(directory, chosen), DataPlan.of(DEMONSTRATIONS, chosen), layout())
    with pytest.raises(DivergedError, match="policy has no trainable weight: nothing is trained"):
        world.loop(recipe, chosen)


def stop_after(world: World, calls: int) -> None:
    """Ask to stop from the given question on."""
    asked = iter(range(10**6))
    world.should_stop = lambda: next(asked) >= calls


@pytest.mark.parametrize(("calls", "step"), [(0, 0), (1, 0), (2, 1), (5, 2)])
def test_a_stop_request_commits_a_checkpoint_of_the_last_whole_step(
    calls: int, step: int, directory: Path, world: World
) -> None:
    chosen = settings(batch_size=4, epochs=3)
    recipe: Recipe = sft_recipe(directory, chosen, tokens_per_batch=80)
    assert [len(recipe.micro_batches(n)) for n in range(3)] == [2, 2, 2]
    stop_after(world, calls)
    with pytest.raises(InterruptedRunError, match=f"before step {step} of 6") as caught:
        world.loop(recipe, chosen).run()
    assert caught.value.exit_code == 143
    assert world.checkpoints.steps == [step]
    assert len(world.told) == step


def test_checkpoints_are_made_when_due_but_not_after_the_last_step(directory: Path, world: World) -> None:
    chosen = settings(batch_size=4, epochs=2)
    world.loop(sft_recipe(directory, chosen), chosen, every_s=0.0).run()
    assert world.checkpoints.steps == [1, 2, 3]


def tree_ids(trees: Sequence[Tree]) -> list[str]:
    return [tree.record_id for tree in trees]


def test_every_row_comes_once_an_epoch_in_a_new_order() -> None:
    chosen = settings(batch_size=3, epochs=2)
    plan = DataPlan.of(DEMONSTRATIONS, chosen)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 6)
    epochs = [[name for step in steps for name in tree_ids(plan.rows(step))] for steps in (range(3), range(3, 6))]
    assert [len(plan.rows(step)) for step in range(6)] == [3, 3, 2, 3, 3, 2]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tree_ids(DEMONSTRATIONS))
    assert epochs[0] != epochs[1]
    other = DataPlan.of(DEMONSTRATIONS, settings(batch_size=3, epochs=2, seed=4))
    assert tree_ids(other.rows(0)) != tree_ids(plan.rows(0))


def test_limits_on_rows_and_steps() -> None:
    few = DataPlan.of(DEMONSTRATIONS, settings(max_rows=5, batch_size=2, max_steps=4, epochs=9))
    assert len(few.trees) == 5
    assert few.num_steps == 4
    assert few.trees == DataPlan.of(DEMONSTRATIONS, settings(max_rows=5)).trees
    assert few.trees != DataPlan.of(DEMONSTRATIONS, settings(max_rows=5, seed=9)).trees


def test_full_batches_follow_one_another_without_a_gap() -> None:
    chosen = settings(batch_size=6)
    plan = DataPlan.of(DEMONSTRATIONS, chosen)
    drawn = [name for number in range(4) for name in tree_ids(plan.full_batch(number))]
    assert len(drawn) == 24
    for epoch in range(3):
        assert sorted(drawn[epoch * 8 : epoch * 8 + 8]) == sorted(tree_ids(DEMONSTRATIONS))
    assert drawn[:8] == tree_ids([*plan.rows(0), *plan.rows(1)])


def test_a_full_batch_of_few_rows_holds_some_twice() -> None:
    plan = DataPlan.of(DEMONSTRATIONS[:2], settings(batch_size=5))
    assert [len(plan.full_batch(number)) for number in range(3)] == [5, 5, 5]
    assert set(tree_ids(plan.full_batch(0))) == set(tree_ids(DEMONSTRATIONS[:2]))
