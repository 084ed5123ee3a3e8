"""What PPO tells of an iteration, what may take its reward's place, pretraining text beside it, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.errors import DataError, DivergedError
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.text.encode import Tree
from pipeline_lib.text.pack import pack
from pipeline_lib.training.collection import Scored
from pipeline_lib.training.critic import FrozenRewardModel, Normalization
from pipeline_lib.training.pretraining import TEXT, PretrainingRows
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.rollout import ValuedRollouts, rollout_tree
from tests.toy import PPO_PROMPTS, World, byte_ids, of_one_iteration, ppo_recipe, ppo_settings

END = 2

# PPO-ptx -------------------------------------------------------------------------------------------


def test_pretraining_gradients_are_added_in_further_forwards(
    directory: Path, reward_directory: Path, world: World
) -> None:
    texts = [Tree(f"{TEXT}{n}", (1,), (tuple(byte_ids(text)),), (False,)) for n, text in enumerate(("abc", "no day"))]
    chosen = ppo_settings(batch_size=4, minibatches=1)

    def gradients(coef: float | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        rows = None if coef is None else PretrainingRows(tuple(texts), coef, rows_per_step=2, seed=0)
        recipe = ppo_recipe(directory, reward_directory, chosen, world=world, pretraining=rows)
        batches = recipe.micro_batches(0)
        figures: dict[str, float] = {}
        for batch in batches:
            result = recipe.loss(batch, batches)
            result.loss.backward()
            figures |= {name: figure.mean for name, figure in result.figures.items()}
        group = recipe.parameter_groups()[0]
        return {
            name: weight.grad.clone() for name, weight in group.parameters.items() if weight.grad is not None
        }, figures

    without, _ = gradients(None)
    with_text, figures = gradients(27.8)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    nll = -token_logps(recipe.policy.model, pack(texts)).token_logp_N.mean()
    assert figures["pretraining_nll_per_token_nats"] == pytest.approx(float(nll.detach()), abs=1e-5)
    (27.8 * nll).backward()
    for name, weight in recipe.parameter_groups()[0].parameters.items():
        if weight.grad is not None:
            torch.testing.assert_close(with_text[name], without[name] + weight.grad, rtol=1e-4, atol=1e-5)


def test_ppo_ptx_trains_and_averages(directory: Path, reward_directory: Path, world: World) -> None:
    text = Tree(f"{TEXT}0", (1,), (tuple(byte_ids("all of it, again and again")),), (False,))
    rows = PretrainingRows((text,), 27.8, rows_per_step=1, seed=0)
    chosen = ppo_settings(iterations=3, ema_decay=0.5)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world, pretraining=rows)
    series = world.loop(recipe, chosen).run()
    figures = [row["pretraining_nll_per_token_nats"] for row in series]
    assert figures[-1] < figures[0] - 0.05


# Figures -------------------------------------------------------------------------------------------


def test_figures_of_an_iteration_by_hand(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(kl_coef=0.5, missing_eos="replace", missing_eos_value=-1.0)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    trees = (rollout_tree(0, [5], [7, 8, END]), rollout_tree(1, [5], [7]))
    recipe._finish_iteration(
        4,
        ValuedRollouts(
            trees, torch.tensor([-1.0, -1.0, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -0.5, -1.0]),
            torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 4.0]), torch.tensor([True, False]),
            value_N=torch.zeros(4),
            full_kl_N=torch.tensor([0.1, 0.2, 0.3, 0.2]), heldout_score_R=torch.tensor([1.0, 0.0]),
            parts_R={"length": torch.tensor([1.0, 3.0])},
        ),
    )  # fmt: skip
    figures = recipe.iteration_figures
    expected = {
        "iteration": 4.0, "ref_kl_nats": -0.5, "ref_kl_k2_nats": 0.375, "ref_kl_full_nats": 0.4,
        "negative_kl_frac": 0.5, "score": 3.0, "score_std": 1.0, "shaped_score": 0.5, "score_per_token": -1.0,
        "non_score_reward": 0.25, "rlhf_reward": 0.75, "entropy_nats": 2.5, "response_tokens": 2.0,
        "finished_frac": 0.5, "distinct_1_frac": 0.75, "distinct_2_frac": 1.0, "repeated_frac": 0.0,
        "duplicates_frac": 0.0, "heldout_score": 0.5, "reward/length": 2.0,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_speeds_are_told_beside_the_series(directory: Path, reward_directory: Path, world: World) -> None:
    told: list[tuple[int, str]] = []
    chosen = ppo_settings()
    recipe = ppo_recipe(
        directory, reward_directory, chosen, world=world,
        on_speed=lambda step, speeds: told.extend((step, name) for name, speed in speeds.items() if speed > 0),
    )  # fmt: skip
    series = world.loop(recipe, chosen).run()
    assert told == [
        (0, "rollout_tokens_per_s"), (3, "update_tokens_per_s"),
        (4, "rollout_tokens_per_s"), (7, "update_tokens_per_s"),
    ]  # fmt: skip
    assert not any("per_s" in name for row in series for name in row)
    assert all(row["explained_variance_frac"] <= 1.0 for row in series)


def test_a_scorer_takes_the_reward_models_place(directory: Path, reward_directory: Path, world: World) -> None:
    class Lengths:
        def score(self, prompts: Sequence[Tree], responses: Sequence[Tree], is_finished: Sequence[bool]) -> Scored:
            assert [tree.prompt_ids for tree in prompts] == [tree.prompt_ids for tree in responses]
            assert len(is_finished) == len(prompts)
            length_R = torch.tensor([float(len(tree.response_ids[0])) for tree in responses])
            return Scored(-length_R, {"length": length_R})

    chosen = ppo_settings()
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world, scorer=Lengths())
    series = world.loop(recipe, chosen).run()
    assert series[0]["score"] == -series[0]["reward/length"] == pytest.approx(-series[0]["response_tokens"], rel=1e-6)


def test_a_held_out_reward_model_scores_and_stays_out(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings()
    heldout = FrozenRewardModel(reward_directory, Normalization(gain=2.0, bias=0.5), settings=chosen)
    with_it = ppo_recipe(directory, reward_directory, chosen, world=world, heldout=heldout)
    rollouts = of_one_iteration(with_it)
    assert rollouts.heldout_score_R is not None
    torch.testing.assert_close(rollouts.heldout_score_R, rollouts.score_R, rtol=0, atol=1e-5)
    again = ValuedRollouts.from_tensors(rollouts.tensors())
    assert torch.equal(again.heldout_score_R, rollouts.heldout_score_R)  # type: ignore[arg-type]
    assert [group.name for group in with_it.parameter_groups()] == ["policy", "value"]


# Bad input -----------------------------------------------------------------------------------------


def test_scores_that_are_no_numbers_name_their_rows(
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ppo_recipe(directory, reward_directory, ppo_settings(), world=world)
    right = recipe.critic.scores

    def scores(batch: Any) -> torch.Tensor:
        found = right(batch)
        found[[tree.record_id for tree in batch.trees].index("3")] = float("nan")
        return found

    monkeypatch.setattr(recipe.critic, "scores", scores)
    row = recipe.plan.full_batch(0)[3].record_id
    with pytest.raises(DivergedError, match=f"gave 1 of 6 responses a score that is not finite; rows: {row[:12]}") as e:
        recipe.micro_batches(0)
    assert e.value.row_ids == (row,)


def test_prompts_that_nothing_can_follow_are_named(directory: Path, reward_directory: Path, world: World) -> None:
    def recipe(*prompts: Tree, **changes: Any) -> PpoRecipe:
        return ppo_recipe(directory, reward_directory, ppo_settings(**changes), world=world, prompts=prompts)

    with pytest.raises(DataError, match="1 prompts have no token; rows: blank"):
        recipe(*PPO_PROMPTS, Tree("blank", (), (), ()))
    long = Tree("long", tuple(byte_ids("x" * 2041)), (), (False,) * 2041)
    with pytest.raises(DataError, match=r"leave no room for 8 tokens in the model's context of 2048; rows: long"):
        recipe(*PPO_PROMPTS, long)
    recipe(*PPO_PROMPTS, replace(long, prompt_ids=long.prompt_ids[1:], prompt_counts=long.prompt_counts[1:]))
