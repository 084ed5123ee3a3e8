"""Resume: weights, figures and everything else bit for bit, wherever and however often it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline_lib.errors import InterruptedRunError, ResumeMismatchError
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.settings import TrainingSettings
from tests.toy import RECIPES, World, ppo_recipe, ppo_settings, settings, sft_recipe, stop_before, weights_of

Run = tuple[dict[str, Tensor], list[dict[str, float]], Recipe]


def plan_of(
    kind: str, directory: Path, reward_directory: Path
) -> tuple[TrainingSettings, Callable[[World], Recipe], int]:
    """Settings, a maker of the recipe, and its number of steps."""
    if kind == "ppo":
        chosen = ppo_settings(iterations=2, minibatches=2, ppo_epochs=2)
        return chosen, lambda world: ppo_recipe(directory, reward_directory, chosen, world=world), 8
    plain = settings(batch_size=4, epochs=3, optimizer={"schedule": "cosine", "warmup_frac": 0.3})
    return plain, lambda world: RECIPES[kind](directory, plain), 6


def train(make: Callable[[World], Recipe], chosen: TrainingSettings, world: World, stops: list[int]) -> Run:
    """Train to the end, stopping before each of some steps and starting anew from the checkpoint."""
    for stop in [*stops, None]:
        world.should_stop = lambda: False
        recipe = make(world)
        loop = world.loop(recipe, chosen)
        if stop is None:
            return weights_of_after(loop.run(), recipe)
        world.should_stop = stop_before(stop, loop)
        with pytest.raises(InterruptedRunError, match=f"before step {stop} of"):
            loop.run()
    raise AssertionError


def weights_of_after(series: list[dict[str, float]], recipe: Recipe) -> Run:
    return weights_of(recipe), series, recipe


def assert_same(one: Run, other: Run) -> None:
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]
    states = one[2].state(), other[2].state()
    assert states[0].values == states[1].values
    assert all(torch.equal(states[0].tensors[name], states[1].tensors[name]) for name in states[0].tensors)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    kind: str, directory: Path, reward_directory: Path, tmp_path: Path
) -> None:
    chosen, make, num_steps = plan_of(kind, directory, reward_directory)
    whole = train(make, chosen, World.at(tmp_path / "whole"), [])
    assert len(whole[1]) == num_steps
    # First, second, middle and last step; and three times in one run. PPO's iterations have 4 steps.
    for stops in ([0], [1], [num_steps // 2], [num_steps - 1], [1, num_steps // 2, num_steps - 1]):
        name = "-".join(map(str, stops))
        assert_same(train(make, chosen, World.at(tmp_path / name), stops), whole)


def test_dropout_draws_the_same_after_a_resume(directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=4, epochs=2, adapter=LoraSettings(rank=4, alpha=8, dropout=0.3))
    quiet = settings(batch_size=4, epochs=2)

    def make(world: World) -> Recipe:
        return sft_recipe(directory, chosen)

    whole = train(make, chosen, World.at(tmp_path / "whole"), [])
    assert_same(train(make, chosen, World.at(tmp_path / "stopped"), [2]), whole)
    without = train(lambda world: sft_recipe(directory, quiet), quiet, World.at(tmp_path / "quiet"), [])
    assert without[1] != whole[1], "dropout should have done something"


def test_a_stop_after_a_periodic_checkpoint_goes_on_from_it(directory: Path, tmp_path: Path) -> None:
    """A kill leaves no checkpoint of its own: the newest periodic one is taken."""
    chosen = settings(batch_size=4, epochs=3)
    whole = train(lambda world: sft_recipe(directory, chosen), chosen, World.at(tmp_path / "whole"), [])
    world = World.at(tmp_path / "killed")
    world.loop(sft_recipe(directory, chosen), chosen, every_s=0.0).run()
    world.checkpoints.steps = [1, 2, 3]
    world.told.clear()
    again = train(lambda world: sft_recipe(directory, chosen), chosen, world, [])
    assert_same(again, whole)
    assert [step for step, _ in world.told] == [3, 4, 5]
    assert "resumed from the checkpoint of step 3" in world.texts


@pytest.mark.parametrize("question", [1, 2, 3, 4, 5, 6])
def test_ppo_stopped_inside_an_iterations_first_step_goes_on_the_same(
    question: int, directory: Path, reward_directory: Path, tmp_path: Path
) -> None:
    """The first step samples, scores and updates; a stop at any place of it must leave no trace."""
    chosen = ppo_settings(iterations=2, minibatches=1, ppo_epochs=1, kl_target_nats=0.5, kl_horizon_responses=20)

    def make(world: World) -> Recipe:
        return ppo_recipe(directory, reward_directory, chosen, world=world, tokens_per_batch=60)

    whole = train(make, chosen, World.at(tmp_path / "whole"), [])
    world = World.at(tmp_path / "stopped")
    asked = iter(range(10**6))
    world.should_stop = lambda: next(asked) >= question
    with pytest.raises(InterruptedRunError, match="before step 0 of 2"):
        world.loop(make(world), chosen).run()
    assert_same(train(make, chosen, world, []), whole)


def stopped(directory: Path, world: World, **changes: Any) -> None:
    chosen = settings(batch_size=4, epochs=3, **changes)
    loop = world.loop(sft_recipe(directory, chosen), chosen)
    world.should_stop = lambda: loop.progress.step >= 2
    with pytest.raises(InterruptedRunError):
        loop.run()
    world.should_stop = lambda: False


def test_a_checkpoint_of_other_parameters_is_refused(directory: Path, world: World) -> None:
    stopped(directory, world)
    other = settings(batch_size=4, epochs=3, adapter=LoraSettings(rank=4, target_modules=("q_proj",)))
    with pytest.raises(ResumeMismatchError, match="trains other parameters"):
        world.loop(sft_recipe(directory, other), other).run()


def test_a_checkpoint_holds_everything_as_safetensors_and_json(directory: Path, world: World) -> None:
    stopped(directory, world)
    folder = world.checkpoints.folder / "2"
    assert {path.name for path in folder.iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "recipe.safetensors", "averages.safetensors",
        "best.safetensors", "state.json",
    }  # fmt: skip
    weights, moments = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
    assert set(moments) == {f"{name}#{slot}" for name in weights for slot in ("step", "exp_avg", "exp_avg_sq")}
    assert {float(value) for name, value in moments.items() if name.endswith("#step")} == {2.0}
    state = json.loads((folder / "state.json").read_bytes())
    assert state["counters"]["step"] == 2
    assert [row["step"] for row in state["counters"]["series"]] == [0, 1]


def test_a_checkpoint_without_optimizer_state_is_refused(directory: Path, world: World) -> None:
    stopped(directory, world)
    save_file({}, world.checkpoints.folder / "2" / "optimizer.safetensors")
    chosen = settings(batch_size=4, epochs=3)
    with pytest.raises(ResumeMismatchError, match="step 2 holds no optimizer state of policy"):
        world.loop(sft_recipe(directory, chosen), chosen).run()


def test_a_ppo_checkpoint_holds_rollouts_and_the_kl_weight(
    directory: Path, reward_directory: Path, world: World
) -> None:
    chosen = ppo_settings(iterations=2, kl_target_nats=0.5, kl_horizon_responses=20)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    loop = world.loop(recipe, chosen)
    world.should_stop = lambda: loop.progress.step >= 5
    with pytest.raises(InterruptedRunError):
        loop.run()
    folder = world.checkpoints.folder / "5"
    kept = load_file(folder / "recipe.safetensors")
    assert torch.equal(kept["logp_N"], recipe.rollouts.logp_N)  # type: ignore[union-attr]
    values = json.loads((folder / "state.json").read_bytes())["recipe"]
    assert values["kl_coef"] == recipe.controller.coef != chosen.kl_coef
    assert len(values["samples"]) == 12
