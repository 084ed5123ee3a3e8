"""Training on own samples with all its state on: interrupted anywhere, any number of times, it ends with the same bits.

An interruption is a stop (the n-th time that somebody asks whether to stop, in sampling, measuring,
scoring or between two forwards of an update) or a crash (an error at the n-th line of progress, after
which only the checkpoints of whole steps are left).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st
from torch import Tensor

from pipeline_lib.errors import InterruptedRunError
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.critic import FrozenRewardModel, Normalization
from pipeline_lib.training.pretraining import TEXT, PretrainingRows
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.group import GroupRecipe
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.reward_scoring import GroupSetScorer, ModelScores, PromptRow, SetScorer
from pipeline_lib.training.reward_set import RewardScorer, RewardSet
from pipeline_lib.training.rewards.contract import Resources
from pipeline_lib.training.settings import OptimizerSettings, TrainingSettings
from pipeline_lib.validation import validate
from tests.toy import (
    PPO_PROMPTS,
    World,
    byte_ids,
    chat,
    dialogue,
    group_recipe,
    group_settings,
    layout,
    ppo_recipe,
    ppo_settings,
    weights_of,
)

FAST = OptimizerSettings(learning_rate=1e-2, schedule="linear", warmup_frac=0.1)
REWARDS = {
    "parts": [
        {"name": "reward_model", "normalize": "running", "clip": [-2, 2]},
        {"name": "length", "target": 4, "unit": "tokens", "weight": 0.5, "normalize": "running"},
    ],
    "on_error": "skip",
    "min_scored_frac": 0.1,
}
TEXTS = tuple(
    Tree(f"{TEXT}{place}", (1,), (tuple(byte_ids(text)),), (False,))
    for place, text in enumerate(("all of it", "and more of it", "once again"))
)
TOKENS = 64
"""Tokens of a forward: several in every step."""


class CrashError(Exception):
    """What ends a process without a word."""


@dataclass
class Case:
    """A kind of training: what makes its recipe anew, and its settings."""

    settings: TrainingSettings
    make: Callable[[World], Recipe]


@dataclass
class Ended:
    """Everything that a training leaves."""

    weights: dict[str, Tensor]
    series: list[dict[str, float]]
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    moments: dict[str, Tensor]
    num_questions: int
    """Times that somebody asked whether to stop."""
    num_texts: int
    """Lines of progress."""


def rewards_of(model: FrozenRewardModel, world: World) -> SetScorer:
    """A set with running normalisation that leaves some responses out, by their own tokens."""
    inner = ModelScores({"reward": model}, layout(tokens_per_batch=TOKENS), torch.device("cpu"), lambda: stops(world))

    def scores_of(name: str, trees: Any, *, is_raw: bool) -> list[float]:
        given = inner(name, trees, is_raw=is_raw)
        return [float("nan") if sum(tree.response_ids[0]) % 7 == 0 else n for tree, n in zip(trees, given, strict=True)]

    rows = {tree.record_id: PromptRow(dialogue("what?")) for tree in PPO_PROMPTS}
    rewards = validate(RewardSet, REWARDS, where="rewards")
    return SetScorer(RewardScorer(rewards, Resources(scores_of=scores_of)), rows, chat())


def stops(world: World) -> bool:
    return world.should_stop()


def trips_once(recipe: PpoRecipe | GroupRecipe) -> Recipe:
    """Give the breaker a limit that the third iteration is past, once."""
    breaker = recipe.breaker
    assert breaker is not None
    breaker.breach = lambda figures: (  # type: ignore[method-assign]
        "too far" if figures["iteration"] == 2 and not breaker.breaches else None
    )
    return recipe


def ppo_case(directory: Path, reward_directory: Path) -> Case:
    chosen = ppo_settings(
        iterations=4, minibatches=2, ppo_epochs=1, batch_size=6, optimizer=FAST, kl_target_nats=0.5,
        kl_horizon_responses=20, ema_decay=0.9, breaker={"max_kl_nats": 1e9}, whiten_rewards=True,
    )  # fmt: skip
    measuring = FrozenRewardModel(reward_directory, Normalization(gain=-1.0, bias=0.5), settings=chosen)

    def make(world: World) -> Recipe:
        recipe = ppo_recipe(
            directory, reward_directory, chosen, world=world, tokens_per_batch=TOKENS, heldout=measuring,
            scorer=rewards_of(measuring, world), pretraining=PretrainingRows(TEXTS, 2.0, rows_per_step=2, seed=5),
        )  # fmt: skip
        return trips_once(recipe)

    return Case(chosen, make)


def group_case(method: str, directory: Path, reward_directory: Path) -> Case:
    chosen = group_settings(
        method, iterations=4, mu=1, batch_size=6, optimizer=FAST, ema_decay=0.9, breaker={"max_kl_nats": 1e9}
    )  # fmt: skip
    model = FrozenRewardModel(reward_directory, Normalization(gain=2.0, bias=0.5), settings=chosen)

    def make(world: World) -> Recipe:
        recipe = group_recipe(
            directory, chosen, GroupSetScorer(rewards_of(model, world)), world=world, tokens_per_batch=TOKENS,
            heldout=model, min_prompts=chosen.minibatches,
        )  # fmt: skip
        return trips_once(recipe)

    return Case(chosen, make)


@pytest.fixture(scope="module", params=["ppo", "rloo", "grpo"])
def case(request: pytest.FixtureRequest, directory: Path, reward_directory: Path) -> Case:
    if request.param == "ppo":
        return ppo_case(directory, reward_directory)
    return group_case(request.param, directory, reward_directory)


def run(case: Case, world: World, *, every_s: float = 1e9) -> Ended:
    """Train to the end, counting the questions and the lines of progress."""
    asked = [0]
    inner = world.should_stop

    def counted() -> bool:
        asked[0] += 1
        return inner()

    world.should_stop = counted
    before = len(world.texts)
    recipe = case.make(world)
    loop = world.loop(recipe, case.settings, every_s=every_s)
    series = loop.run()
    state = recipe.state()
    moments = {
        f"{group.name}/{name}#{slot}": torch.as_tensor(value).clone()
        for group in recipe.parameter_groups()
        for name, parameter in group.parameters.items()
        for slot, value in loop.optimizer.state[parameter].items()
    }
    return Ended(
        weights_of(recipe), series, dict(state.values), state.tensors, moments, asked[0], len(world.texts) - before
    )


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = run(case, World.at(tmp_path_factory.mktemp("whole")))
    assert len(ended.series) > 0
    remembered = json.loads(ended.state["scorer"])
    assert remembered["length"][0] > len(ended.series[0:1]), "the running moments have seen every iteration"
    assert min(row["reward/scored_frac"] for row in ended.series) < 1.0, "some responses were left out"
    assert [row["breaches"] for row in ended.series] == [0.0] * 4 + [1.0] * 4
    assert all("heldout_score" in row for row in ended.series)
    if "kl_coef" in ended.series[0]:
        assert len({row["kl_coef"] for row in ended.series}) == 4, "the controller moved in every iteration"
    return ended


Interruption = tuple[Literal["stop", "crash"], float]


def interrupt(case: Case, world: World, whole: Ended, interruption: Interruption) -> bool:
    """Begin or go on, and break off after a share of the whole way, where there is as much left; tell whether."""
    kind, share = interruption
    left = [int(share * (whole.num_questions if kind == "stop" else whole.num_texts))]
    told = world.texts

    class Texts(list[str]):
        def append(self, text: str) -> None:
            told.append(text)
            left[0] -= 1
            if left[0] < 0:
                raise CrashError

    def should_stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    try:
        if kind == "stop":
            world.should_stop = should_stop
            run(case, world)
        else:
            world.texts = Texts()
            run(case, world, every_s=0.0)
    except (InterruptedRunError, CrashError):
        return True
    finally:
        world.should_stop = lambda: False
        world.texts = told
    return False


@given(
    interruptions=st.lists(
        st.tuples(st.sampled_from(["stop", "crash"]), st.floats(0.0, 0.7)), min_size=1, max_size=2
    )
)  # fmt: skip
@trials(
    max_examples=4, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_interrupted_anywhere_it_ends_with_the_same_bits(
    case: Case, whole: Ended, tmp_path_factory: pytest.TempPathFactory, interruptions: list[Interruption]
) -> None:
    world = World.at(tmp_path_factory.mktemp("interrupted"))
    broken_off = [interrupt(case, world, whole, interruption) for interruption in interruptions]
    assert broken_off[0]
    again = run(case, world)
    assert again.series == whole.series
    assert again.state == whole.state, "samples, controller, breaker, running moments, figures"
    for one, other in ((again.weights, whole.weights), (again.tensors, whole.tensors), (again.moments, whole.moments)):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
