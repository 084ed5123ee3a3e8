"""DPO against PPO where the true reward is known: in miniature the controlled task of the DPO paper.

The rule of the toy task labels pairs of the speaker's own samples. DPO trains on the pairs; PPO trains on
a reward model that was trained on the same pairs, and, as a bound for it, on the rule itself. All are
swept over the weight of their KL and measured by the rule and the KL of whole responses, on fresh
samples. Source: Rafailov et al. 2023 (arXiv 2305.18290), section 6.1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.learns_methods import (
    RESPONSES_PER_ITERATION,
    SAMPLES_MEASURED,
    SHARED,
    Curve,
    constant,
    ppo_recipe,
    ppo_settings,
)
from benchmarks.learns_task import MAX_NEW_TOKENS, Task, draw, measure, train
from pipeline_lib.hashing import derive_seed
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.losses.reward import REWARD_LOSSES
from pipeline_lib.losses.reward.normalization import normalization
from pipeline_lib.models.heads import init_head, load_scalar_model
from pipeline_lib.models.sampling import SamplingSettings, sample
from pipeline_lib.models.scoring import response_logps, response_scores
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.critic import Critic, Normalization
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.preferences import Judgement
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.preference import PreferenceRecipe
from pipeline_lib.training.recipes.reward import Label, RewardRecipe
from pipeline_lib.training.sampling_rollouts import group_tree
from pipeline_lib.training.settings import OfflineSettings, TrainingSettings
from pipeline_lib.training.trained_model import TrainedModel, prepare

BETAS = (1.0, 0.3, 0.1, 0.03)
"""DPO's, from strong to weak."""
KL_WEIGHTS = (0.2, 0.05, 0.02, 0.005)
"""PPO's, from strong to weak."""
EPOCHS = 4
"""Passes over the pairs, of DPO and of the reward model."""
TEST_PAIRS = 256
MEASUREMENTS = 3
"""How often a training is measured on its way, its end included."""
SAMPLES_ON_THE_WAY = 16


@dataclass(frozen=True)
class LearntReward:
    """A reward model of the pairs."""

    directory: Path
    normalization: Normalization
    """Gives the speaker's samples mean and spread that the rule gives them, so that KL weights mean the same."""
    test_accuracy_frac: float
    """Share of fresh pairs that it orders as the rule does."""


def sweep(task: Task, workdir: Path, *, iterations: int, seed: int) -> tuple[dict[str, Any], list[PreTrainedModel]]:
    """Train every method at every weight; return the figures, and the policies that saw the rule itself.

    Args:
        task: The task.
        workdir: Folder for the reward model.
        iterations: Of PPO; DPO gets pairs of as many responses as these draw.
        seed: Of everything.
    """
    responses = iterations * RESPONSES_PER_ITERATION
    pairs = label_pairs(task, count=responses // 2, seed=derive_seed(seed, "pairs"))
    learnt = learn_reward(task, pairs, workdir, seed=seed)
    runs = [_dpo(task, pairs, workdir, beta=beta, seed=seed) for beta in BETAS]
    policies = []
    for reward in (None, learnt):
        for weight in KL_WEIGHTS:
            policy, found = _ppo(task, reward, workdir, weight=weight, iterations=iterations, seed=seed)
            runs.append(found)
            if reward is None:
                policies.append(policy.model)
    figures = {
        "responses": responses, "pairs": len(pairs), "runs": runs, "test_accuracy_frac": learnt.test_accuracy_frac
    }  # fmt: skip
    return figures, policies


def label_pairs(task: Task, *, count: int, seed: int) -> list[Tree]:
    """Draw pairs of the speaker's samples; the rule says which is better, and that one comes first.

    Args:
        task: The task.
        count: Pairs that are drawn; those with one score are left out.
        seed: Of the samples.
    """
    prompts = DataPlan.of(task.prompts, OfflineSettings(batch_size=count, seed=seed)).full_batch(0)
    drawn = sample(
        task.speaker(), [tree.prompt_ids for tree in prompts],
        SamplingSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=256), eos_id=task.chat.eos_id,
        pad_id=task.chat.pad_id, seed=seed, samples_per_prompt=2,
    )  # fmt: skip
    both = [
        group_tree(index, tree.prompt_ids, [one.ids for one in drawn[2 * index : 2 * index + 2]])
        for index, tree in enumerate(prompts)
    ]
    scores_P2 = task.rule.of(both, [one.is_finished for one in drawn])[0].view(-1, 2)
    return ordered(both, scores_P2)


def ordered(trees: list[Tree], scores_P2: torch.Tensor) -> list[Tree]:
    """Return trees of two responses with the better one first; those with one score are left out."""
    found: list[Tree] = []
    for tree, (first, second) in zip(trees, scores_P2.tolist(), strict=True):
        if first != second:
            responses = tree.response_ids if first > second else tree.response_ids[::-1]
            found.append(group_tree(len(found), tree.prompt_ids, responses))
    return found


def learn_reward(task: Task, pairs: list[Tree], workdir: Path, *, seed: int) -> LearntReward:
    """Train a reward model on pairs, better first, and write it as a folder."""
    settings = OfflineSettings.model_validate(
        {**SHARED, "batch_size": 32, "max_response_tokens": MAX_NEW_TOKENS, "epochs": EPOCHS, "seed": seed,
         "optimizer": constant(5e-4)}
    )  # fmt: skip
    model = load_scalar_model(task.directory, dtype=torch.float32)
    init_head(model, seed=derive_seed(seed, "reward head"))
    trained = prepare(model, task.directory, settings, seed=seed)
    recipe = RewardRecipe(
        trained, DataPlan.of(pairs, settings), task.layout,
        objective=REWARD_LOSSES.build({"name": "bradley_terry", "centring": 0.01}),
        labels={tree.record_id: Label((1, 2)) for tree in pairs},
    )  # fmt: skip
    train(recipe, settings, workdir)
    trained.save(workdir / "reward")
    test = label_pairs(task, count=TEST_PAIRS, seed=derive_seed(seed, "test pairs"))
    right = [better > worse for better, worse in response_scores(trained.model, test, task.layout).values()]
    drawn = draw(task, task.speaker(), samples=SAMPLES_ON_THE_WAY, seed=derive_seed(seed, "spread"))
    by_tree = response_scores(trained.model, drawn.trees, task.layout)
    raw_R = torch.tensor([score for tree in drawn.trees for score in by_tree[tree.record_id]])
    scale = normalization(raw_R, target_mean=float(drawn.scores.mean()), target_std=float(drawn.scores.std()))
    return LearntReward(workdir / "reward", Normalization(*scale), sum(right) / len(right))


def _dpo(task: Task, pairs: list[Tree], workdir: Path, *, beta: float, seed: int) -> dict[str, Any]:
    settings = OfflineSettings.model_validate(
        {**SHARED, "batch_size": 32, "max_response_tokens": MAX_NEW_TOKENS, "epochs": EPOCHS, "seed": seed,
         "optimizer": constant(3e-4)}
    )  # fmt: skip
    policy = task.policy(settings)
    reference = {name: tuple(row) for name, row in response_logps(policy.model, pairs, task.layout).items()}
    nan = (float("nan"), float("nan"))
    recipe = PreferenceRecipe(
        policy, DataPlan.of(pairs, settings), task.layout,
        objective=PREFERENCE_LOSSES.build({"name": "dpo", "beta": beta}),
        judgements={tree.record_id: Judgement((1, 2), nan, (True, False)) for tree in pairs}, reference=reference,
    )  # fmt: skip
    return _finish("dpo", beta, task, policy, recipe, settings, workdir)


def _ppo(
    task: Task, reward: LearntReward | None, workdir: Path, *, weight: float, iterations: int, seed: int
) -> tuple[TrainedModel, dict[str, Any]]:
    """Train by PPO on the learnt reward, or on the rule where there is none."""
    settings = ppo_settings(strength=weight, iterations=iterations, seed=seed)
    directory = task.critic_directory if reward is None else reward.directory
    scale = Normalization() if reward is None else reward.normalization
    critic = Critic(directory, settings, scale, seed=seed, value_init=settings.value_init)
    recipe = ppo_recipe(task, critic, settings, scorer=task.rule if reward is None else None)
    name = "ppo_true" if reward is None else "ppo_learnt"
    return recipe.policy, _finish(name, weight, task, recipe.policy, recipe, settings, workdir)


def _finish(
    method: str, strength: float, task: Task, policy: TrainedModel, recipe: Recipe, settings: TrainingSettings,
    workdir: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train, measure on the way and at the end, and return the run as JSON values."""
    curve: Curve = [{"score": measure(task, policy, samples=SAMPLES_ON_THE_WAY, seed=0).score, "kl_nats": 0.0}]
    places = {recipe.num_steps * part // MEASUREMENTS for part in range(1, MEASUREMENTS)}

    def on_step(step: int) -> None:
        if step + 1 in places:
            found = measure(task, policy, samples=SAMPLES_ON_THE_WAY, seed=derive_seed(settings.seed, "way", step))
            curve.append({"score": found.score, "kl_nats": found.kl_nats})

    train(recipe, settings, workdir, on_step=on_step)
    shown = measure(task, policy, samples=SAMPLES_MEASURED, seed=derive_seed(settings.seed, "measure"))
    print(f"{method} at {strength}: {shown}", flush=True)
    curve.append({"score": shown.score, "kl_nats": shown.kl_nats})
    return {"method": method, "strength": strength, "curve": curve, **asdict(shown)}
