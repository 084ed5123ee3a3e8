"""SFT as InstructGPT publishes it: residual dropout, and weights chosen by a reward model's score of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.config import PRESETS, load
from pipeline_lib.errors import DataError, InterruptedRunError
from pipeline_lib.models.heads import head_of
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.training.critic import Normalization
from pipeline_lib.training.early_stopping import EarlyStopping
from pipeline_lib.training.loop import TrainingLoop
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import ParameterGroup, Scored
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.selection import AnswerScore
from pipeline_lib.training.settings import EarlyStoppingSettings, OfflineSettings, SelectionSettings
from tests.toy import (
    DEMONSTRATIONS,
    World,
    chat,
    furthest,
    layout,
    policy_of,
    settings,
    sharpen,
    stop_before,
    weights_of,
)

HELD_OUT = {"held_out_frac": 0.4, "every_steps": 1, "patience": 100}
NORMALIZATION = Normalization(gain=2.0, bias=0.5)


def recipe_of(directory: Path, chosen: OfflineSettings, **how: Any) -> SftRecipe:
    kept = {name: how.pop(name) for name in ("tokens_per_batch",) if name in how}
    return SftRecipe(policy_of(directory, chosen), DataPlan.of(DEMONSTRATIONS, chosen), layout(**kept), **how)


def selection(reward_directory: Path, chosen: OfflineSettings, **changes: Any) -> AnswerScore:
    values = {"reward_model": "any", "prompts": 8, "max_new_tokens": 6, **changes}
    found = AnswerScore.load(
        reward_directory, NORMALIZATION, DataPlan.of(DEMONSTRATIONS, chosen).held_out,
        selection=SelectionSettings(**values), training=chosen, chat=chat(),
    )  # fmt: skip
    sharpen(found.reward_model.model, 3.0)
    return found


# Residual dropout ------------------------------------------------------------------------------------------


def test_dropout_is_in_training_forwards_alone(directory: Path) -> None:
    chosen = settings(batch_size=3, early_stopping=HELD_OUT)
    plain, noisy = (recipe_of(directory, chosen, residual_dropout=dropout) for dropout in (0.0, 0.2))
    assert plain.held_out_loss() == noisy.held_out_loss()
    (batch,) = plain.micro_batches(0)
    losses = []
    for recipe in (plain, noisy):
        with recipe.training_forward(batch):
            losses.append(float(recipe.loss(batch, [batch]).loss.detach()))
    assert abs(losses[0] - losses[1]) > 1e-4
    assert losses[0] == float(noisy.loss(batch, [batch]).loss.detach())


@pytest.mark.parametrize("extra", [{}, {"gradient_checkpointing": True, "adapter": None, "neftune_alpha": 5.0}])
def test_resumed_three_times_it_ends_with_the_same_bits(extra: dict[str, Any], directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=3, epochs=2, **extra)
    whole = recipe_of(directory, chosen, residual_dropout=0.2)
    series = World.at(tmp_path / "whole").loop(whole, chosen).run()
    world = World.at(tmp_path / "cut")
    for step in (1, 3, 5):
        loop = world.loop(recipe_of(directory, chosen, residual_dropout=0.2), chosen)
        world.should_stop = stop_before(step, loop)
        with pytest.raises(InterruptedRunError):
            loop.run()
    world.should_stop = lambda: False
    resumed = recipe_of(directory, chosen, residual_dropout=0.2)
    assert world.loop(resumed, chosen).run() == series
    assert furthest(weights_of(resumed), weights_of(whole)) == 0.0


def test_what_a_forward_draws_does_not_depend_on_the_others(directory: Path, tmp_path: Path) -> None:
    """Processes share a step's forwards: with dropout and noise, too, each draws what it would draw alone."""
    chosen = settings(batch_size=8, epochs=2, neftune_alpha=5.0, optimizer={"epsilon": 1e-5})

    def run(name: str, *, backwards: bool) -> tuple[list[dict[str, float]], SftRecipe]:
        recipe = recipe_of(directory, chosen, residual_dropout=0.2, tokens_per_batch=60)
        loop: TrainingLoop = World.at(tmp_path / name).loop(recipe, chosen)
        whole = loop.weights.share

        def share(batches: Sequence[Any]) -> list[Any]:
            return whole(batches)[::-1] if backwards else whole(batches)

        loop.weights.share = share  # type: ignore[method-assign]
        return loop.run(), recipe

    (forth, one), (back, other) = (run(name, backwards=name == "back") for name in ("forth", "back"))
    assert len(one.micro_batches(0)) > 2
    assert [row["loss"] for row in back] == pytest.approx([row["loss"] for row in forth], abs=1e-5)
    assert furthest(weights_of(one), weights_of(other)) <= 1e-5


# Selection -------------------------------------------------------------------------------------------------


def test_a_higher_score_is_better_by_hand() -> None:
    group = ParameterGroup("g", {"w": torch.nn.Parameter(torch.zeros(1))}, 0.1)
    stopping = EarlyStopping([group], EarlyStoppingSettings(every_steps=1, patience=2, min_gain=0.1))
    for step, (loss, score) in enumerate([(1.0, -0.5), (2.0, 0.5), (0.1, 0.55), (0.0, float("nan"))]):
        with torch.no_grad():
            group.parameters["w"].fill_(float(step))
        assert not stopping.has_ended
        stopping.record(step, loss, score=score)
    assert stopping.has_ended
    assert stopping.outcome == "kept step 2, held-out score 0.5000"
    again = EarlyStopping([group], stopping.settings)
    again.load(stopping.counters(), stopping.best)
    assert again.outcome == stopping.outcome
    stopping.restore()
    assert group.parameters["w"].item() == 1.0


def test_the_score_is_the_reward_models_of_the_models_own_answers(directory: Path, reward_directory: Path) -> None:
    chosen = settings(batch_size=3, early_stopping=HELD_OUT)
    judge = selection(reward_directory, chosen)
    recipe = recipe_of(directory, chosen, selection=judge)
    assert isinstance(recipe, Scored)
    held_out = {tree.prompt_ids for tree in recipe.plan.held_out}
    assert {tree.prompt_ids for tree in judge.prompts} == held_out
    assert not held_out & {tree.prompt_ids for tree in recipe.plan.trees}

    model = recipe.policy.model
    answers = sample(
        model, [tree.prompt_ids for tree in judge.prompts], SamplingSettings(max_new_tokens=6, batch_size=32),
        eos_id=chat().eos_id, pad_id=chat().pad_id, seed=judge.seed,
    )  # fmt: skip
    scores = []
    for tree, answer in zip(judge.prompts, answers, strict=True):
        whole = torch.tensor([[*tree.prompt_ids, *answer.ids]])
        with torch.no_grad():  # transformers' own way to a score
            hidden = judge.reward_model.model.base_model(whole).last_hidden_state[0, -1]
            scores.append(2.0 * float(head_of(judge.reward_model.model)(hidden)) + 0.5)
    assert len(set(scores)) > 1
    found = recipe.held_out_score()
    assert found == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    assert recipe.held_out_score() == found, "the same weights have the same score"
    assert recipe_of(directory, chosen).held_out_score() is None


def test_fewer_prompts_are_chosen_by_the_seed(reward_directory: Path) -> None:
    chosen = [settings(seed=seed, early_stopping={**HELD_OUT, "held_out_frac": 0.8}) for seed in (1, 1, 2)]
    taken = [tuple(tree.record_id for tree in selection(reward_directory, each, prompts=2).prompts) for each in chosen]
    assert taken[0] == taken[1] != taken[2]
    assert all(len(names) == 2 for names in taken)


def test_the_best_scored_weights_are_the_result(directory: Path, reward_directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=4, epochs=4, early_stopping=HELD_OUT, adapter=None, optimizer={"learning_rate": 1e-2})
    judge = selection(reward_directory, chosen)
    recipe = recipe_of(directory, chosen, selection=judge)
    world = World.at(tmp_path / "whole")
    series = world.loop(recipe, chosen).run()
    scores, losses = ([row[name] for row in series] for name in ("held_out_score", "held_out_loss"))
    best = scores.index(max(scores))
    assert len(series) == recipe.num_steps
    assert recipe.held_out_score() == pytest.approx(max(scores), abs=1e-5)
    assert world.texts[-1] == f"kept step {best + 1}, held-out score {max(scores):.4f}"
    assert best != losses.index(min(losses)), "the loss would have chosen other weights: the test can tell"

    world = World.at(tmp_path / "cut")
    for step in (1, 3):
        loop = world.loop(recipe_of(directory, chosen, selection=judge), chosen)
        world.should_stop = stop_before(step, loop)
        with pytest.raises(InterruptedRunError):
            loop.run()
    world.should_stop = lambda: False
    resumed = recipe_of(directory, chosen, selection=judge)
    assert world.loop(resumed, chosen).run() == series
    assert furthest(weights_of(resumed), weights_of(recipe)) == 0.0


def test_scores_that_are_no_numbers_are_named(directory: Path, reward_directory: Path) -> None:
    chosen = settings(batch_size=3, early_stopping=HELD_OUT)
    judge = selection(reward_directory, chosen)
    with torch.no_grad():
        head_of(judge.reward_model.model).weight.fill_(float("nan"))
    with pytest.raises(DataError, match="gave 3 answers no finite score; rows: "):
        recipe_of(directory, chosen, selection=judge).held_out_score()


def test_the_preset_is_the_published_one() -> None:
    sft = load(PRESETS / "methods" / "sft-instructgpt.yaml", RunConfig).value.sft
    assert (sft.epochs, sft.batch_size, sft.residual_dropout, sft.adapter) == (16, 32, 0.2, None)
    optimizer = sft.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.final_frac) == (9.65e-6, "cosine", 0.1)
    assert (optimizer.warmup_frac, optimizer.min_warmup_steps) == (0.0, 0)
    assert sft.select_by is not None
    assert sft.early_stopping is not None
