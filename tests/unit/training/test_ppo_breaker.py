"""The circuit breaker: every limit, back to the last good state, the end with the best, bit for bit after any stop."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError, InterruptedRunError
from pipeline_lib.training.breaker import CircuitBreaker
from pipeline_lib.training.critic import FrozenRewardModel, Normalization
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.settings import BreakerSettings, OptimizerSettings, PpoSettings
from tests.toy import World, ppo_recipe, ppo_settings, stop_before, weights_of

FAST = OptimizerSettings(learning_rate=2e-2, schedule="constant", warmup_frac=0.0)
OFF: dict[str, Any] = dict.fromkeys(BreakerSettings.model_fields)
HEALTHY = {
    "ref_kl_nats": 1.0, "response_tokens": 20.0, "entropy_nats": 2.0, "finished_frac": 0.9, "repeated_frac": 0.1,
    "duplicates_frac": 0.0, "rlhf_reward": 0.5, "heldout_score": 0.4,
}  # fmt: skip


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


def scripted(monkeypatch: pytest.MonkeyPatch, recipe: PpoRecipe, *breaches: str | None) -> list[dict[str, Tensor]]:
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
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ppo_settings(iterations=4, breaker={}, optimizer=FAST, ema_decay=0.9)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
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
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ppo_settings(iterations=2, breaker={}, optimizer=FAST)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    start = weights_of(recipe)
    seen = scripted(monkeypatch, recipe, None, "too far", None)
    loop = world.loop(recipe, chosen)
    loop.run()
    assert same(seen[2], start)
    assert recipe.breaker is not None
    assert (recipe.breaker.good_is_start, recipe.breaker.best_is_start) == (True, True)
    assert {float(state["step"]) for state in loop.optimizer.state.values()} == {4.0}


def test_the_second_breach_ends_with_the_best_iteration(
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ppo_settings(iterations=6, breaker={}, optimizer=FAST, kl_target_nats=None, kl_coef=0.0)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
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


def test_a_breach_before_any_update_is_refused(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(breaker=OFF | {"min_entropy_nats": 100.0})
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    with pytest.raises(DivergedError, match=r"iteration 1: entropy, .* before any update"):
        world.loop(recipe, chosen).run()


def test_the_held_out_reward_decides_which_iteration_is_best(
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ppo_settings(iterations=4, breaker={}, optimizer=FAST)
    heldout = FrozenRewardModel(reward_directory, Normalization(gain=-2.0, bias=-0.5), settings=chosen)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world, heldout=heldout)
    scripted(monkeypatch, recipe, None, None, None, "too far", "too far")
    series = world.loop(recipe, chosen).run()
    held_out = [row["heldout_score"] for row in series[::4]]
    assert recipe.breaker is not None
    assert held_out[recipe.breaker.best_iteration] == max(held_out) == recipe.breaker.best_reward
    assert held_out == pytest.approx([-row["score"] for row in series[::4]], abs=1e-5)


# Resume --------------------------------------------------------------------------------------------
# The limits let only a model through that is its own reference, so iteration 2 breaches, goes back,
# and iteration 3 ends the training: 8 steps of 12.


def tight() -> PpoSettings:
    limits = OFF | {"max_kl_nats": 1e-4, "min_kl_nats": -1e-4}
    return ppo_settings(iterations=3, breaker=limits, optimizer=FAST, kl_horizon_responses=20)


Ended = tuple[dict[str, Tensor], list[dict[str, float]], dict[str, Tensor], dict[str, Any]]


def ended(directory: Path, reward_directory: Path, world: World) -> Ended:
    recipe = ppo_recipe(directory, reward_directory, tight(), world=world, tokens_per_batch=60)
    series = world.loop(recipe, tight()).run()
    state = recipe.state()
    return weights_of(recipe), series, state.tensors, dict(state.values)


def assert_equal(one: Ended, other: Ended) -> None:
    assert same(one[0], other[0])
    assert one[1] == other[1]
    assert one[2].keys() == other[2].keys()
    assert same(one[2], other[2])
    assert one[3] == other[3]


@pytest.fixture(scope="module")
def whole(directory: Path, reward_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The uninterrupted training."""
    found = ended(directory, reward_directory, World.at(tmp_path_factory.mktemp("whole")))
    assert len(found[1]) == 8
    assert [row["breaches"] for row in found[1]] == [0.0] * 4 + [1.0] * 4
    return found


@pytest.mark.parametrize("stops", [[4], [5], sorted(random.Random(1).sample(range(8), 3)), [0, 7]])
def test_a_stop_between_steps_changes_nothing(
    stops: list[int], whole: Ended, directory: Path, reward_directory: Path, world: World
) -> None:
    for stop in stops:
        loop = world.loop(ppo_recipe(directory, reward_directory, tight(), world=world, tokens_per_batch=60), tight())
        world.should_stop = stop_before(stop, loop)
        with pytest.raises(InterruptedRunError, match=f"before step {stop} of"):
            loop.run()
        world.should_stop = lambda: False
    assert_equal(ended(directory, reward_directory, world), whole)


def test_a_stop_anywhere_while_going_back_changes_nothing(
    whole: Ended, directory: Path, reward_directory: Path, tmp_path: Path
) -> None:
    """Of all questions whether to stop, those between the fourth step and the fifth, and some beyond."""
    counted = World.at(tmp_path / "counted")
    questions: list[int] = []
    loop = counted.loop(ppo_recipe(directory, reward_directory, tight(), world=counted, tokens_per_batch=60), tight())

    def count() -> bool:
        questions.append(loop.progress.step)
        return False

    counted.should_stop = count
    loop.run()
    going_back = [number for number, step in enumerate(questions) if step == 4]
    assert len(going_back) > 8
    for number in [*random.Random(2).sample(going_back, 4), going_back[-1] + 3, len(questions) - 2]:
        world = World.at(tmp_path / str(number))
        asked = iter(range(10**6))
        world.should_stop = lambda: next(asked) >= number  # noqa: B023  (used up in this round of the loop)
        recipe = ppo_recipe(directory, reward_directory, tight(), world=world, tokens_per_batch=60)
        with pytest.raises(InterruptedRunError):
            world.loop(recipe, tight()).run()
        world.should_stop = lambda: False
        assert_equal(ended(directory, reward_directory, world), whole)
