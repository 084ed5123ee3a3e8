"""Faults of training that hide in a green log, each planted here and caught by a check of its own.

Every test runs its check on the code as it is, and on the code with the fault in it: a check that
does not notice its fault would be worth nothing. Where the product itself stops, its own message is
asked for; the other checks are functions here, whose messages name the fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraModel
from safetensors.torch import save_file

from pipeline_lib.errors import DivergedError, InterruptedRunError, ResumeMismatchError
from pipeline_lib.losses.preference.dpo import Dpo
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.scoring import response_logps
from pipeline_lib.models.settings import LoraSettings
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training import loop as loop_module
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import StepLoss
from pipeline_lib.training.recipes.preference import PreferenceRecipe
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import TrainingSettings
from tests.toy import (
    DEMONSTRATIONS,
    JUDGED,
    PAIRS,
    World,
    dpo_recipe,
    furthest,
    layout,
    policy_of,
    ppo_recipe,
    ppo_settings,
    settings,
    sft_recipe,
    stop_before,
    weights_of,
)

END = 2


# 1 ---------------------------------------------------------------------------------------------------


def test_01_a_nan_is_not_hidden(directory: Path, world: World) -> None:
    chosen = settings()
    recipe = sft_recipe(directory, chosen)
    with torch.no_grad():
        recipe.policy.model.base_model.layers[1].mlp.up_proj.base_layer.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"the loss is nan at step 0; rows of the step: [0-9a-f]{12}"):
        world.loop(recipe, chosen).run()


# 2 ---------------------------------------------------------------------------------------------------


def test_02_the_base_model_is_not_taken_for_the_reference(
    directory: Path, reward_directory: Path, world: World, tmp_path: Path
) -> None:
    chosen = settings(epochs=4, adapter=None, optimizer={"learning_rate": 5e-3})
    fine_tuned = sft_recipe(directory, chosen)
    world.loop(fine_tuned, chosen).run()
    fine_tuned.policy.save(tmp_path / "sft")
    of_base = response_logps(load_causal_model(directory, dtype=torch.float32), PAIRS, layout())
    recipe = PreferenceRecipe(
        policy_of(tmp_path / "sft", settings()), DataPlan.of(PAIRS, settings()), layout(),
        objective=Dpo(), judgements=JUDGED, reference={name: tuple(row) for name, row in of_base.items()},
    )  # fmt: skip
    with pytest.raises(DivergedError, match="policy and reference differ"):
        World.at(tmp_path / "dpo").loop(recipe, settings()).run()

    ppo = ppo_recipe(tmp_path / "sft", reward_directory, ppo_settings(), world=world)
    base = Reference(ppo.policy, load_causal_model(directory, dtype=torch.float32))
    ppo.collector = replace(ppo.collector, reference=base)
    with pytest.raises(DivergedError, match="policy and reference differ"):
        World.at(tmp_path / "ppo").loop(ppo, ppo_settings()).run()


# 9 ---------------------------------------------------------------------------------------------------


class PerForwardMean(SftRecipe):
    """The planted fault: each forward takes its own token mean, and the step the mean of these."""

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        alone = super().loss(batch, [batch])
        return StepLoss(alone.loss / len(step_batches), alone.figures)


def check_accumulation(recipe_class: type[SftRecipe], directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=8, epochs=3, optimizer={"epsilon": 1e-5})
    found = []
    for tokens in (4096, 16):
        recipe = recipe_class(
            policy_of(directory, chosen), DataPlan.of(DEMONSTRATIONS, chosen), layout(tokens_per_batch=tokens)
        )
        World.at(tmp_path / f"{recipe_class.__name__}-{tokens}").loop(recipe, chosen).run()
        found.append(weights_of(recipe))
    apart = furthest(*found)
    assert apart <= 1e-5, f"8 x 1 and 1 x 8 train different weights, by {apart:.1e}"


def test_09_accumulation_weighs_tokens_alike(directory: Path, tmp_path: Path) -> None:
    check_accumulation(SftRecipe, directory, tmp_path)
    with pytest.raises(AssertionError, match="8 x 1 and 1 x 8 train different weights"):
        check_accumulation(PerForwardMean, directory, tmp_path)


# 10 --------------------------------------------------------------------------------------------------


def check_ledger(directory: Path, world: World, *, stops: Sequence[int] = (1, 3, 4)) -> None:
    """Every row exactly once an epoch, whatever the stops."""
    chosen = settings(batch_size=2, epochs=2)
    ledger: list[str] = []
    for stop in [*stops, None]:
        recipe = sft_recipe(directory, chosen)
        made = world.loop(recipe, chosen)
        note_rows(made, recipe, ledger)
        world.should_stop = stop_before(stop, made) if stop else lambda: False
        if stop is None:
            made.run()
        else:
            with pytest.raises(InterruptedRunError):
                made.run()
    for epoch in range(2):
        count = Counter(ledger[epoch * 8 : epoch * 8 + 8])
        expected = Counter(tree.record_id for tree in DEMONSTRATIONS)
        assert count == expected, f"resuming repeats or skips rows in epoch {epoch}: {sorted(count.values())}"


def note_rows(made: Any, recipe: SftRecipe, ledger: list[str]) -> None:
    """Write down the rows of every step that was finished."""
    whole_step = made._step

    def noted(step: int) -> dict[str, float]:
        figures: dict[str, float] = whole_step(step)
        ledger.extend(tree.record_id for batch in recipe.batches_of_step for tree in batch.trees)  # type: ignore[attr-defined]
        return figures

    lay_out = recipe.micro_batches

    def kept(step: int) -> Sequence[TreeBatch]:
        recipe.batches_of_step = lay_out(step)  # type: ignore[attr-defined]
        return recipe.batches_of_step  # type: ignore[attr-defined,no-any-return]

    made._step, recipe.micro_batches = noted, kept  # type: ignore[method-assign]


def test_10_resume_neither_repeats_nor_skips(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_ledger(directory, World.at(tmp_path / "good"))
    right = DataPlan.rows
    asked: list[DataPlan] = []

    def from_the_start(self: DataPlan, step: int) -> list[Tree]:
        """The planted fault: a cursor in memory, which begins at 0 in every process."""
        asked.append(self)
        place = sum(plan is self for plan in asked) - 1
        return right(self, place)

    monkeypatch.setattr(DataPlan, "rows", from_the_start)
    with pytest.raises(AssertionError, match="resuming repeats or skips rows"):
        check_ledger(directory, World.at(tmp_path / "bad"))


# 11 --------------------------------------------------------------------------------------------------


def stop_at(directory: Path, world: World, chosen: TrainingSettings, step: int) -> None:
    made = world.loop(sft_recipe(directory, chosen), chosen)
    world.should_stop = lambda: made.progress.step >= step
    with pytest.raises(InterruptedRunError):
        made.run()
    world.should_stop = lambda: False


def check_random_numbers(directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=4, epochs=2, adapter=LoraSettings(rank=4, dropout=0.3))
    whole, parts = World.at(tmp_path / "whole"), World.at(tmp_path / "parts")
    series = whole.loop(sft_recipe(directory, chosen), chosen).run()
    stop_at(directory, parts, chosen, 2)
    again = parts.loop(sft_recipe(directory, chosen), chosen).run()
    assert series == again, "random numbers after a resume are not those of an uninterrupted run"


def test_11_optimizer_or_random_numbers_lost_on_resume(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(batch_size=4, epochs=2)
    world = World.at(tmp_path / "optimizer")
    stop_at(directory, world, chosen, 2)
    save_file({}, world.checkpoints.folder / "2" / "optimizer.safetensors")
    with pytest.raises(ResumeMismatchError, match="holds no optimizer state of policy"):
        world.loop(sft_recipe(directory, chosen), chosen).run()

    check_random_numbers(directory, tmp_path / "good")
    seeded = iter(range(10**6))
    monkeypatch.setattr(loop_module, "derive_seed", lambda *scope: next(seeded))
    with pytest.raises(AssertionError, match="random numbers after a resume"):
        check_random_numbers(directory, tmp_path / "bad")


# 12 --------------------------------------------------------------------------------------------------


def test_12_the_adapters_are_not_lost_in_merging(
    directory: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(epochs=2)
    recipe = sft_recipe(directory, chosen)
    world.loop(recipe, chosen).run()
    prompts = [torch.tensor([list(tree.prompt_ids)]) for tree in DEMONSTRATIONS] + [torch.tensor([[5, 6]])] * 2
    with torch.no_grad():
        adapted = [recipe.policy.model(ids).logits for ids in prompts]
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(DivergedError, match="the merged model is not the adapted one"):
        recipe.policy.save(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    monkeypatch.undo()

    recipe = sft_recipe(directory, chosen)
    World.at(tmp_path / "again").loop(recipe, chosen).run()
    recipe.policy.save(tmp_path / "kept")
    merged = load_causal_model(tmp_path / "kept", dtype=torch.float32)
    with torch.no_grad():
        apart = max(float((merged(ids).logits - one).abs().max()) for ids, one in zip(prompts, adapted, strict=True))
    assert apart <= 1e-4


# 16 --------------------------------------------------------------------------------------------------


def test_16_training_that_trains_nothing(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings(batch_size=8)

    frozen = sft_recipe(directory, chosen)
    frozen.policy.model.requires_grad_(requires_grad=False)
    with pytest.raises(DivergedError, match="policy has no trainable weight"):
        World.at(tmp_path / "frozen").loop(frozen, chosen)

    detached = sft_recipe(directory, chosen)
    whole_loss = detached.loss

    def useless(batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        result = whole_loss(batch, step_batches)
        return StepLoss(result.loss * 0.0, result.figures)

    detached.loss = useless  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="the gradient is 0 at step 0: nothing is trained"):
        World.at(tmp_path / "detached").loop(detached, chosen).run()

    idle = dpo_recipe(directory, chosen)
    made = World.at(tmp_path / "idle").loop(idle, chosen)
    monkeypatch.setattr(made.optimizer, "step", lambda: None)
    made.run()
    with pytest.raises(DivergedError, match="training changed no weight"):
        idle.policy.save(tmp_path / "out")
