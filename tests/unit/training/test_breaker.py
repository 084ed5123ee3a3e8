"""The circuit breaker of PPO, RLOO and GRPO: every limit, back to the last good state, the end with the best.

All of it bit for bit after any stop. Every method makes four steps an iteration here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError, InterruptedRunError
from pipeline_lib.training.breaker import CircuitBreaker
from pipeline_lib.training.critic import FrozenRewardModel, Normalization
from pipeline_lib.training.loop import TrainingLoop
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.recipes.group import GroupRecipe
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.sampling_rollouts import RewardModelScorer
from pipeline_lib.training.settings import BreakerSettings, OptimizerSettings
from tests.toy import (
    World,
    group_recipe,
    group_settings,
    layout,
    ppo_recipe,
    ppo_settings,
    stop_before,
    weights_of,
)

FAST = OptimizerSettings(learning_rate=2e-2, schedule="constant", warmup_frac=0.0)
OFF: dict[str, Any] = dict.fromkeys(BreakerSettings.model_fields)
HEALTHY = {
    "ref_kl_nats": 1.0, "response_tokens": 20.0, "entropy_nats": 2.0, "finished_frac": 0.9, "repeated_frac": 0.1,
    "duplicates_frac": 0.0, "rlhf_reward": 0.5, "heldout_score": 0.4,
}  # fmt: skip


Recipe = PpoRecipe | GroupRecipe


@dataclass(frozen=True)
class Method:
    """What makes a training of a method."""

    settings: Callable[..., Any]
    recipe: Callable[..., Recipe]
    without_kl: dict[str, Any]
    """Settings under which the reward is the score alone."""


@pytest.fixture(scope="module", params=["ppo", "rloo", "grpo"])
def method(request: pytest.FixtureRequest, directory: Path, reward_directory: Path) -> Method:
    if request.param == "ppo":

        def ppo(chosen: Any, world: World, **how: Any) -> PpoRecipe:
            return ppo_recipe(directory, reward_directory, chosen, world=world, **how)

        return Method(ppo_settings, ppo, {"kl_target_nats": None, "kl_coef": 0.0})

    def group(chosen: Any, world: World, **how: Any) -> GroupRecipe:
        model = FrozenRewardModel(reward_directory, Normalization(gain=2.0, bias=0.5), settings=chosen)
        scorer = RewardModelScorer(model, layout(), lambda: world.should_stop())
        return group_recipe(directory, chosen, scorer, world=world, **how)

    def settings(**changes: Any) -> Any:
        return group_settings(request.param, **changes)

    return Method(settings, group, {"beta": 0.0})


def breaker(**limits: Any) -> CircuitBreaker:
    """A breaker of one weight, with one good iteration behind it."""
    made = CircuitBreaker(BreakerSettings(**(OFF | limits)))
    weight = torch.nn.Parameter(torch.zeros(1))
    made.bind([ParameterGroup("w", {"w": weight}, 0.1)], torch.optim.AdamW([weight]), None)
    assert made.breach(HEALTHY) is None
    made.keep(0, HEALTHY)
    return made


@pytest.mark.parametrize(
    ("limit", "value", "figure", "bad", "told"),
    [
        ("max_kl_nats", 5.0, "ref_kl_nats", 5.5, "KL from the reference, nats a response: 5.5 is above 5"),
        ("min_kl_nats", -1.0, "ref_kl_nats", -1.5, "-1.5 is below -1"),
        ("max_length_drift", 2.0, "response_tokens", 41.0, r"\(20.0 in the first iteration\): 41 is above 40"),
        ("max_length_drift", 2.0, "response_tokens", 9.0, "9 is below 10"),
        ("min_entropy_nats", 0.5, "entropy_nats", 0.4, "entropy, nats a token: 0.4 is below 0.5"),
        ("min_finished_frac", 0.5, "finished_frac", 0.4, "share of responses that end: 0.4 is below 0.5"),
        ("max_repeated_frac", 0.5, "repeated_frac", 0.6, "share of repeated text: 0.6 is above 0.5"),
        ("max_duplicates_frac", 0.5, "duplicates_frac", 0.6, "share of duplicate responses: 0.6 is above 0.5"),
        ("max_heldout_drop", 1.0, "heldout_score", -0.7, "held-out reward model: -0.7 is below -0.6"),
    ],
)
def test_every_limit_is_told_with_its_figure(limit: str, value: float, figure: str, bad: float, told: str) -> None:
    on, off = breaker(**{limit: value}), breaker()
    assert on.breach(HEALTHY) is None
    breach = on.breach(HEALTHY | {figure: bad})
    assert re.search(told, str(breach))
    assert off.breach(HEALTHY | {figure: bad}) is None


def test_the_held_out_score_falls_from_its_best() -> None:
    watched = breaker(max_heldout_drop=0.5)
    watched.keep(1, HEALTHY | {"heldout_score": 1.0})
    watched.keep(2, HEALTHY | {"heldout_score": 0.8})
    assert watched.breach(HEALTHY | {"heldout_score": 0.51}) is None
    assert watched.breach(HEALTHY | {"heldout_score": 0.49}) is not None
    assert watched.best_iteration == 1
    without = {name: value for name, value in HEALTHY.items() if name != "heldout_score"}
    assert watched.breach(without) is None


def scripted(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, *breaches: str | None) -> list[dict[str, Tensor]]:
    """Let the breaker say this at each measurement; return the weights at each, as they are gathered."""
    assert recipe.breaker is not None
    answers: Iterator[str | None] = iter(breaches)
    seen: list[dict[str, Tensor]] = []

    def breach(figures: Any) -> str | None:
        seen.append(weights_of(recipe))
        return next(answers)

    monkeypatch.setattr(recipe.breaker, "breach", breach)
    return seen


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_breach_goes_back_and_halves_the_rate(
    method: Method, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method.settings(iterations=4, breaker={}, optimizer=FAST, ema_decay=0.9)
    recipe = method.recipe(chosen, world)
    seen = scripted(monkeypatch, recipe, None, None, "too far", None, None)
    loop = world.loop(recipe, chosen)
    series = loop.run()
    assert len(series) == 16
    # Measured: iteration 1, 2, 3 (bad), 3 again, 4. Back is to where iteration 2 was measured.
    assert not same(seen[0], seen[1])
    assert not same(seen[1], seen[2])
    assert same(seen[3], seen[1])
    assert not same(seen[4], seen[3])
    assert [row["learning_rate"] for row in series] == [2e-2] * 8 + [1e-2] * 8
    assert [row["breaches"] for row in series] == [0.0] * 8 + [1.0] * 8
    assert any("iteration 3: too far; back to before iteration 2" in text for text in world.texts)
    # Moments went back too: 4 steps before iteration 2, then those of iterations 3 and 4.
    assert {float(state["step"]) for state in loop.optimizer.state.values()} == {12.0}
    assert recipe.breaker is not None
    assert recipe.breaker.breaches == ["iteration 3: too far"]
    assert not recipe.breaker.good_is_start


def test_going_back_to_the_start_forgets_the_moments(
    method: Method, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method.settings(iterations=2, breaker={}, optimizer=FAST)
    recipe = method.recipe(chosen, world)
    start = weights_of(recipe)
    seen = scripted(monkeypatch, recipe, None, "too far", None)
    loop = world.loop(recipe, chosen)
    loop.run()
    assert same(seen[2], start)
    assert recipe.breaker is not None
    assert (recipe.breaker.good_is_start, recipe.breaker.best_is_start) == (True, True)
    assert {float(state["step"]) for state in loop.optimizer.state.values()} == {4.0}


def test_the_second_breach_ends_with_the_best_iteration(
    method: Method, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method.settings(iterations=6, breaker={}, optimizer=FAST, **method.without_kl)
    recipe = method.recipe(chosen, world)
    seen = scripted(monkeypatch, recipe, None, None, None, "too far", None, "too short")
    series = world.loop(recipe, chosen).run()
    assert len(series) == 16, "four iterations were trained on"
    assert recipe.breaker is not None
    best = recipe.breaker.best_iteration
    rewards = [row["rlhf_reward"] for row in series[::4]]
    assert rewards[best] == max(rewards) == recipe.breaker.best_reward
    measured = {0: seen[0], 1: seen[1], 2: seen[2], 3: seen[4]}
    assert same(weights_of(recipe), measured[best])
    (told,) = [text for text in world.texts if text.startswith("stopped by the circuit breaker")]
    assert "iteration 4: too far; iteration 5: too short" in told
    assert f"the result is the state before iteration {best + 1}" in told


def test_a_breach_before_any_update_is_refused(method: Method, world: World) -> None:
    chosen = method.settings(breaker=OFF | {"min_entropy_nats": 100.0})
    recipe = method.recipe(chosen, world)
    with pytest.raises(DivergedError, match=r"iteration 1: entropy, .* before any update"):
        world.loop(recipe, chosen).run()


def test_the_held_out_reward_decides_which_iteration_is_best(
    method: Method, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = method.settings(iterations=4, breaker={}, optimizer=FAST)
    heldout = FrozenRewardModel(reward_directory, Normalization(gain=-2.0, bias=-0.5), settings=chosen)
    recipe = method.recipe(chosen, world, heldout=heldout)
    scripted(monkeypatch, recipe, None, None, None, "too far", "too far")
    series = world.loop(recipe, chosen).run()
    held_out = [row["heldout_score"] for row in series[::4]]
    assert recipe.breaker is not None
    assert held_out[recipe.breaker.best_iteration] == max(held_out) == recipe.breaker.best_reward
    assert held_out == pytest.approx([-row["score"] for row in series[::4]], abs=1e-5)


# Resume --------------------------------------------------------------------------------------------
# The limits let only a model through that is its own reference, so iteration 2 breaches, goes back,
# and iteration 3 ends the training: 8 steps of 12.


def tight(method: Method) -> Any:
    limits = OFF | {"max_kl_nats": 1e-4, "min_kl_nats": -1e-4}
    return method.settings(iterations=3, breaker=limits, optimizer=FAST, ema_decay=0.9)


def training(method: Method, world: World) -> tuple[Recipe, TrainingLoop]:
    recipe = method.recipe(tight(method), world, tokens_per_batch=60)
    return recipe, world.loop(recipe, tight(method))


@dataclass(frozen=True)
class Ended:
    """Everything that a training leaves."""

    weights: dict[str, Tensor]
    series: list[dict[str, float]]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def ended(method: Method, world: World) -> Ended:
    recipe, loop = training(method, world)
    series = loop.run()
    state = recipe.state()
    return Ended(weights_of(recipe), series, state.tensors, dict(state.values))


def assert_equal(one: Ended, other: Ended) -> None:
    assert same(one.weights, other.weights)
    assert one.series == other.series
    assert one.tensors.keys() == other.tensors.keys()
    assert same(one.tensors, other.tensors)
    assert one.values == other.values


@pytest.fixture(scope="module")
def whole(method: Method, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The uninterrupted training."""
    found = ended(method, World.at(tmp_path_factory.mktemp("whole")))
    assert len(found.series) == 8
    assert [row["breaches"] for row in found.series] == [0.0] * 4 + [1.0] * 4
    assert [row["learning_rate"] for row in found.series] == [2e-2] * 4 + [1e-2] * 4
    return found


@pytest.mark.parametrize("stops", [[4], sorted(random.Random(1).sample(range(8), 3)), [0, 7]])
def test_a_stop_between_steps_changes_nothing(stops: list[int], whole: Ended, method: Method, world: World) -> None:
    for stop in stops:
        _, loop = training(method, world)
        world.should_stop = stop_before(stop, loop)
        with pytest.raises(InterruptedRunError, match=f"before step {stop} of"):
            loop.run()
        world.should_stop = lambda: False
    assert_equal(ended(method, world), whole)


def test_a_stop_anywhere_while_going_back_changes_nothing(whole: Ended, method: Method, tmp_path: Path) -> None:
    """Of all questions whether to stop, those between the fourth step and the fifth, and some beyond."""
    counted = World.at(tmp_path / "counted")
    questions: list[int] = []
    _, loop = training(method, counted)

    def count() -> bool:
        questions.append(loop.progress.step)
        return False

    counted.should_stop = count
    loop.run()
    going_back = [number for number, step in enumerate(questions) if step == 4]
    assert len(going_back) > 8
    for number in [*random.Random(2).sample(going_back, 2), going_back[-1] + 3, len(questions) - 2]:
        world = World.at(tmp_path / str(number))
        asked = iter(range(10**6))
        world.should_stop = lambda: next(asked) >= number  # noqa: B023  (used up in this round of the loop)
        _, loop = training(method, world)
        with pytest.raises(InterruptedRunError):
            loop.run()
        world.should_stop = lambda: False
        assert_equal(ended(method, world), whole)
