"""Every adapter through the loop: it learns, it resumes, what is saved is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.errors import ConfigError, DivergedError, IntegrityError, InterruptedRunError
from pipeline_lib.models.adapters import without_adapter
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.models.scoring import response_logps, response_scores
from pipeline_lib.models.virtual_tokens import FOLDER
from pipeline_lib.training.reference import Reference, require_same_weights
from pipeline_lib.training.settings import OfflineSettings, PpoSettings
from pipeline_lib.training.trained_model import TrainedModel, prepare
from pipeline_lib.validation import validate
from tests.toy import (
    PAIRS,
    World,
    dpo_recipe,
    layout,
    policy_of,
    ppo_recipe,
    ppo_settings,
    reward_recipe,
    settings,
    sft_recipe,
    stop_before,
    weights_of,
)

ADAPTERS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "lora": {"name": "lora", "rank": 4},
    "rslora": {"name": "lora", "rank": 4, "use_rslora": True},
    "dora": {"name": "lora", "rank": 4, "use_dora": True},
    "ia3": {"name": "ia3"},
    "prefix": {"name": "prefix", "num_tokens": 6},
    "prompt": {"name": "prompt", "num_tokens": 6},
}
VIRTUAL = ["prefix", "prompt"]


def chosen_for(name: str, **changes: Any) -> OfflineSettings:
    rate = {"full": 1e-3, "lora": 5e-3, "rslora": 5e-3, "dora": 5e-3}.get(name, 2e-2)
    values = settings(batch_size=4, epochs=3, optimizer={"learning_rate": rate}).model_dump() | changes
    return validate(OfflineSettings, values | {"adapter": ADAPTERS[name]}, where="test")


def logps_of(trained: TrainedModel) -> dict[str, list[float]]:
    return response_logps(trained.model, PAIRS, layout())


def assert_close(one: dict[str, list[float]], other: dict[str, list[float]], *, atol: float) -> None:
    assert one.keys() == other.keys()
    for key, values in one.items():
        assert values == pytest.approx(other[key], abs=atol)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_it_learns_and_the_saved_model_is_the_trained_one(
    name: str, directory: Path, tmp_path: Path, world: World
) -> None:
    chosen = chosen_for(name, epochs=6)
    recipe = sft_recipe(directory, chosen)
    losses = [row["loss"] for row in world.loop(recipe, chosen).run()]
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.02  # an epoch has two steps
    trained = logps_of(recipe.trained)
    recipe.trained.save(tmp_path / "out")
    loaded = load_causal_model(tmp_path / "out", dtype=torch.float32)
    assert_close(response_logps(loaded, PAIRS, layout()), trained, atol=1e-3)
    assert (tmp_path / "out" / FOLDER).is_dir() == (name in VIRTUAL)


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_the_reference_is_what_training_began_with(name: str, directory: Path, world: World) -> None:
    chosen = chosen_for(name)
    recipe = sft_recipe(directory, chosen)
    reference = Reference.of(recipe.trained)
    base = response_logps(load_causal_model(directory, dtype=torch.float32), PAIRS, layout())
    world.loop(recipe, chosen).run()
    with reference.active() as model:
        assert_close(response_logps(model, PAIRS, layout()), base, atol=1e-5)


@pytest.mark.parametrize("name", ["dora", "ia3", *VIRTUAL])
def test_a_resumed_training_is_the_uninterrupted_one(name: str, directory: Path, tmp_path: Path) -> None:
    chosen = chosen_for(name)

    def run(world: World, stops: list[int]) -> dict[str, Tensor]:
        for stop in stops:
            loop = world.loop(sft_recipe(directory, chosen), chosen)
            world.should_stop = stop_before(stop, loop)
            with pytest.raises(InterruptedRunError):
                loop.run()
            world.should_stop = lambda: False
        recipe = sft_recipe(directory, chosen)
        world.loop(recipe, chosen).run()
        return weights_of(recipe)

    whole, resumed = run(World.at(tmp_path / "whole"), []), run(World.at(tmp_path / "stopped"), [2, 5])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "ia3"])
def test_what_merges_starts_as_its_reference(name: str, directory: Path) -> None:
    policy = policy_of(directory, chosen_for(name))
    on = logps_of(policy)
    with without_adapter(policy.adapter):
        assert_close(logps_of(policy), on, atol=1e-5)
    assert policy.starts_as_reference


@pytest.mark.parametrize("name", VIRTUAL)
def test_dpo_of_virtual_tokens_begins_apart_from_its_reference_and_learns(
    name: str, directory: Path, world: World
) -> None:
    chosen = chosen_for(name, epochs=8)
    recipe = dpo_recipe(directory, chosen)
    assert not recipe.policy.starts_as_reference
    with without_adapter(recipe.policy.adapter):
        reference = response_logps(recipe.policy.model, PAIRS, layout())
    recipe.reference = {key: tuple(row) for key, row in reference.items()}
    series = world.loop(recipe, chosen).run()
    assert series[0]["log_ratio_abs_nats_per_token"] > 1e-4
    assert series[-1]["loss"] < series[0]["loss"]


def fine_tuned(directory: Path, name: str, root: Path) -> Path:
    """The folder of a model whose adapter was trained on demonstrations."""
    chosen = chosen_for(name)
    recipe = sft_recipe(directory, chosen)
    World.at(root / "sft").loop(recipe, chosen).run()
    recipe.trained.save(root / "out")
    return root / "out"


@pytest.mark.parametrize("name", VIRTUAL)
def test_dpo_trains_loaded_tokens_on_from_its_reference(name: str, directory: Path, tmp_path: Path) -> None:
    chosen = chosen_for(name)
    recipe = dpo_recipe(fine_tuned(directory, name, tmp_path), chosen)
    assert recipe.policy.starts_as_reference
    series = World.at(tmp_path / "dpo").loop(recipe, chosen).run()  # check_start would stop it
    assert series[0]["log_ratio_abs_nats_per_token"] < 1e-5
    assert series[-1]["log_ratio_abs_nats_per_token"] > 1e-3


@pytest.mark.parametrize("name", VIRTUAL)
def test_lora_on_a_model_with_tokens_keeps_them(name: str, directory: Path, tmp_path: Path) -> None:
    lora = chosen_for("lora")
    recipe = dpo_recipe(fine_tuned(directory, name, tmp_path), lora)
    World.at(tmp_path / "dpo").loop(recipe, lora).run()
    trained = logps_of(recipe.policy)
    recipe.policy.save(tmp_path / "second")
    loaded = load_causal_model(tmp_path / "second", dtype=torch.float32)
    assert_close(response_logps(loaded, PAIRS, layout()), trained, atol=1e-3)


@pytest.mark.parametrize("name", VIRTUAL)
def test_a_reward_model_is_trained_through_virtual_tokens(
    name: str, directory: Path, tmp_path: Path, world: World
) -> None:
    chosen = chosen_for(name)
    recipe = reward_recipe(directory, chosen)
    world.loop(recipe, chosen).run()
    scores = response_scores(recipe.trained.model, PAIRS, layout())
    recipe.trained.save(tmp_path / "out")
    loaded = load_scalar_model(tmp_path / "out", dtype=torch.float32).eval()
    assert_close(response_scores(loaded, PAIRS, layout()), scores, atol=1e-4)


@pytest.mark.parametrize("name", ["ia3", *VIRTUAL])
def test_ppo_runs(name: str, directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(adapter=dict(ADAPTERS[name] or {}, **({"init": "random"} if name in VIRTUAL else {})))
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    series = world.loop(recipe, chosen).run()
    assert len(series) == recipe.num_steps
    assert all(row["approx_kl_nats"] < 1.0 for row in series)


def test_the_default_is_lora_and_a_section_without_a_name_is_too() -> None:
    assert OfflineSettings().adapter == validate(OfflineSettings, {"adapter": {"rank": 16}}, where="x").adapter
    assert validate(OfflineSettings, {"adapter": None}, where="x").adapter is None


def test_the_old_key_is_refused_with_the_new_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'lora'; did you mean 'adapter' \(name: lora"):
        validate(OfflineSettings, {"lora": {"rank": 4}}, where="x")
    with pytest.raises(ConfigError, match=r"adapter\.name: unknown 'lorra'; did you mean 'lora'\?"):
        validate(OfflineSettings, {"adapter": {"name": "lorra"}}, where="x")
    with pytest.raises(ConfigError, match=r"unknown key 'adapter\.rank': prefix has none, only lora, qlora"):
        validate(OfflineSettings, {"adapter": {"name": "prefix", "rank": 4}}, where="x")


def test_ppo_takes_no_dropout() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.dropout must be 0"):
        validate(PpoSettings, {"adapter": {"name": "lora", "dropout": 0.1}}, where="x")


def test_a_prefix_and_recomputed_activations_do_not_go_together(directory: Path) -> None:
    with pytest.raises(ConfigError, match="without the trained keys"):
        policy_of(directory, chosen_for("prefix", gradient_checkpointing=True))
    assert policy_of(directory, chosen_for("prompt", gradient_checkpointing=True))


def test_qlora_without_cuda_names_what_is_missing(directory: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    chosen = validate(OfflineSettings, {"adapter": {"name": "qlora"}, "precision": "fp32"}, where="x")
    model = load_causal_model(directory, dtype=torch.float32)
    with pytest.raises(ConfigError, match="qlora needs a CUDA device"):
        prepare(model, directory, chosen, seed=0)


def test_untrained_tokens_are_not_saved(directory: Path, tmp_path: Path) -> None:
    for name in ("lora", *VIRTUAL):
        with pytest.raises(DivergedError, match="training changed no"):
            policy_of(directory, chosen_for(name)).save(tmp_path / name)


def test_a_reference_of_other_weights_is_refused() -> None:
    sft = {"model/model.safetensors": "a" * 64, "model/config.json": "b" * 64}
    require_same_weights(sft, dict(sft))
    with pytest.raises(IntegrityError, match=r"is not the model that the policy starts from: model/model\.safetensors"):
        require_same_weights(sft, sft | {"model/model.safetensors": "c" * 64})
    with pytest.raises(IntegrityError, match="virtual_tokens"):
        require_same_weights(sft | {"model/virtual_tokens/adapter_model.safetensors": "d" * 64}, sft)
