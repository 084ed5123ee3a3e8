"""What is checked before the first update, and which rows a fault names where trees are no rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.text.pack import TreeBatch
from pipeline_lib.training.recipe import StepLoss
from pipeline_lib.training.recipes.ppo import PpoRecipe
from tests.toy import (
    PPO_PROMPTS,
    World,
    dpo_recipe,
    ppo_recipe,
    ppo_settings,
    preference_recipe,
    record,
    settings,
)


@pytest.mark.parametrize("is_same", [True, False])
def test_noise_on_the_embeddings_is_no_other_model(is_same: bool, directory: Path, world: World) -> None:
    """NEFTune moves the policy's log-probabilities: whether it starts as its reference is measured without."""
    chosen = settings(neftune_alpha=50.0)
    recipe = dpo_recipe(directory, chosen)
    assert recipe.reference is not None
    if is_same:
        assert world.loop(recipe, chosen).run()[0]["log_ratio_abs_nats_per_token"] > 1e-2
        return
    recipe.reference = {name: tuple(value + 0.5 for value in row) for name, row in recipe.reference.items()}
    with pytest.raises(DivergedError, match="at step 0 policy and reference differ"):
        world.loop(recipe, chosen).run()


def test_a_policy_that_is_not_the_one_that_sampled_is_stopped(
    directory: Path, reward_directory: Path, world: World
) -> None:
    chosen = ppo_settings()
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    collect = recipe._collect

    def moved(iteration: int) -> Any:
        rollouts = collect(iteration)
        with torch.no_grad():
            for name, parameter in recipe.parameter_groups()[0].parameters.items():
                if "lora_B" in name:
                    parameter.add_(0.05)
        return rollouts

    recipe._collect = moved  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="the policy differs from itself"):
        world.loop(recipe, chosen).run()


class Broken(PpoRecipe):
    """PPO whose loss of one kind is no number."""

    def loss(self, batch: TreeBatch, step_batches: Sequence[TreeBatch]) -> StepLoss:
        found = super().loss(batch, step_batches)
        return StepLoss(found.loss * float("nan"), found.figures)


def test_a_fault_in_ppo_names_the_rows_of_its_prompts(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings()
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    recipe.__class__ = Broken
    with pytest.raises(DivergedError, match="the loss is nan at step 0") as caught:
        world.loop(recipe, chosen).run()
    assert recipe.rollouts is not None
    members = recipe.minibatch(0)
    asked = {recipe.rollouts.trees[place].prompt_ids for place in members}
    assert set(caught.value.row_ids) == {tree.record_id for tree in PPO_PROMPTS if tree.prompt_ids in asked}
    assert caught.value.row_ids[0][:12] in caught.value.cause


def test_the_target_of_tied_best_responses_is_their_mean(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLiC's KL to the reference is measured on the best response: of several, whatever their order, on their mean."""
    kl_R = torch.tensor([2.0, 4.0, 9.0], dtype=torch.float32)

    def found(order: tuple[int, int, int]) -> float:
        texts = ("first", "second one", "worst")
        row = record("question", *[texts[place] for place in order], ranks=tuple((1, 1, 2)[place] for place in order))
        recipe = preference_recipe(
            directory, settings(), {"name": "slic", "reg": "kl", "lam": 1.0, "delta": 1e-9}, [row]
        )

        def terms(policy: object, reference: object, batch: TreeBatch) -> tuple[Tensor, Tensor]:
            lengths = batch.lengths_R
            token_logp_N = torch.zeros(int(lengths.sum()))
            kl_N = torch.cat(
                [(kl_R[place] / length).expand(int(length)) for place, length in zip(order, lengths, strict=True)]
            )
            return token_logp_N, kl_N

        monkeypatch.setattr("pipeline_lib.training.recipes.preference.token_logps_and_kl", terms)
        batch = recipe.layout.batches(recipe.plan.rows(0))[0]
        return float(recipe.loss(batch, [batch]).loss)

    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        assert found(order) == pytest.approx(3.0, abs=1e-5)
