"""Generators in PPO and GRPO: the same training from all in this process; vLLM's numbers only compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.errors import GeneratorError
from pipeline_lib.training.generating import EveryEighth
from pipeline_lib.training.recipes.group import GroupRecipe
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.rollout import Rollouts, ValuedRollouts
from pipeline_lib.training.settings import OptimizerSettings
from tests.toy import World, group_recipe, group_settings, ppo_recipe, ppo_settings, weights_of
from tests.unit.generation.fake_vllm import Server, TinyEngine, serving

OPTIMIZER = OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup_frac=0.0)


@pytest.fixture
def server(directory: Path) -> Iterator[Server]:
    with serving(TinyEngine(directory)) as served:
        yield served


class ByLength:
    """Longer is better."""

    def score(self, prompts: Any, samples: Any, is_finished: Any) -> Tensor:
        return torch.tensor([float(len(set(ids))) for tree in samples for ids in tree.response_ids])


def ppo(directory: Path, reward_directory: Path, world: World, spec: dict[str, Any], **changes: Any) -> PpoRecipe:
    chosen = ppo_settings(generator=spec, optimizer=OPTIMIZER, **changes)
    return ppo_recipe(directory, reward_directory, chosen, world=world)


def grpo(directory: Path, world: World, spec: dict[str, Any]) -> GroupRecipe:
    chosen = group_settings("grpo", minibatches=1, mu=1, generator=spec, optimizer=OPTIMIZER)
    return group_recipe(directory, chosen, ByLength(), world=world)


def test_ppo_learns_the_same_from_both_generators_of_this_process(
    directory: Path, reward_directory: Path, tmp_path: Path
) -> None:
    trained = {}
    for name in ("batched", "continuous"):
        world = World.at(tmp_path / name)
        recipe = ppo(directory, reward_directory, world, {"name": name})
        world.loop(recipe, recipe.settings).run()
        trained[name] = weights_of(recipe)
        assert not any("mismatch" in key for _, figures in world.told for key in figures)
    for key, value in trained["batched"].items():
        torch.testing.assert_close(trained["continuous"][key], value, rtol=0, atol=1e-5, msg=key)


def test_ppo_trains_on_what_a_server_says_and_compares_it(
    directory: Path, reward_directory: Path, world: World, server: Server
) -> None:
    recipe = ppo(directory, reward_directory, world, server.spec(), temperature=0.8)
    world.loop(recipe, recipe.settings).run()
    figures = [figures for _, figures in world.told]
    assert all(0 <= row["rollout/mismatch_nats"] < 1e-5 for row in figures)
    assert all(abs(row["policy_kl_nats"]) < 1e-6 for row in figures[:1]), "the ratio begins at 1"
    assert len(server.engine.loads) == recipe.settings.iterations, "each iteration has weights of its own"
    kept = recipe.rollouts
    assert kept is not None
    again = ValuedRollouts.from_tensors(kept.tensors())
    assert again.mismatch_nats is not None
    assert torch.equal(again.mismatch_nats, kept.mismatch_nats)


def test_a_server_of_another_model_is_noticed(
    directory: Path, reward_directory: Path, world: World, server: Server
) -> None:
    with torch.no_grad():
        server.engine.model.get_input_embeddings().weight.mul_(20.0)
    server.engine.load_adapter = lambda name, _: server.engine.adapters.update({name: server.engine.model})  # type: ignore[method-assign]
    recipe = ppo(directory, reward_directory, world, server.spec())
    with pytest.raises(GeneratorError, match="nats a token from those of the policy"):
        recipe.micro_batches(0)


def test_grpo_trains_on_what_a_server_says_and_compares_it(directory: Path, world: World, server: Server) -> None:
    recipe = grpo(directory, world, server.spec())
    world.loop(recipe, recipe.settings).run()
    assert all(0 <= row["rollout/mismatch_nats"] < 1e-5 for _, row in world.told)
    assert {body["n"] for body in server.bodies("/v1/completions")} == {3}
    kept = recipe.rollouts
    assert kept is not None
    again = Rollouts.from_tensors(kept.tensors())
    assert again.mismatch_nats is not None
    assert again.trees == kept.trees


def test_grpo_learns_the_same_from_both_generators_of_this_process(directory: Path, tmp_path: Path) -> None:
    trained = {}
    for name in ("batched", "continuous"):
        world = World.at(tmp_path / name)
        recipe = grpo(directory, world, {"name": name})
        world.loop(recipe, recipe.settings).run()
        trained[name] = weights_of(recipe)
    for key, value in trained["batched"].items():
        torch.testing.assert_close(trained["continuous"][key], value, rtol=0, atol=1e-5, msg=key)


def test_a_training_says_which_generator_it_has(directory: Path, world: World) -> None:
    chosen = grpo(directory, world, {"name": "continuous"}).settings
    assert json.loads(chosen.model_dump_json())["generator"] == {"name": "continuous"}
    written = ppo_settings(generator={"name": "vllm", "url": "http://127.0.0.1:8000"}).model_dump(mode="json")
    assert written["generator"]["retries"] == 4, "defaults are written out, for the stage key"


def test_progress_is_a_line_an_eighth() -> None:
    told = EveryEighth(20)
    assert [done for done in range(1, 21) if told.is_due(done)] == [1, 3, 5, 8, 10, 13, 15, 18, 20]
    few = EveryEighth(2)
    assert [done for done in (1, 1, 2, 2) if few.is_due(done)] == [1, 2]
