"""The methods of `ppo_learns`, each trained by its real recipe on the toy task, at equal generated responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.learns_task import MAX_NEW_TOKENS, GroupRule, Measured, Task, draw, measure, train
from pipeline_lib.hashing import derive_seed
from pipeline_lib.losses.preference import PREFERENCE_LOSSES
from pipeline_lib.models.sampling import Sample, SamplingSettings, sample
from pipeline_lib.models.scoring import response_logps
from pipeline_lib.rl.best_of_n import expected_best, kl_nats
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.collection import ResponseScorer
from pipeline_lib.training.critic import Critic, Normalization
from pipeline_lib.training.group_settings import GroupSettings, GrpoSettings, RlooSettings
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.preferences import Judgement
from pipeline_lib.training.recipes.group import GroupRecipe
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.recipes.preference import PreferenceRecipe
from pipeline_lib.training.recipes.sft import SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.sampling_rollouts import GroupSampler, group_tree
from pipeline_lib.training.settings import OfflineSettings, OptimizerSettings, PpoSettings
from pipeline_lib.training.trained_model import TrainedModel

RESPONSES_PER_ITERATION = 64
SHARED: dict[str, Any] = {"adapter": None, "precision": "fp32", "tokens_per_batch": 512, "max_prompt_tokens": 32}
ONLINE: dict[str, Any] = {**SHARED, "max_new_tokens": MAX_NEW_TOKENS, "missing_eos": "keep", "max_kl_nats": 1e4}
SAMPLES_MEASURED = 64
"""Fresh samples of each prompt by which a trained policy is measured."""
Curve = list[dict[str, float]]
"""(responses, score, kl_nats) as training went on."""


@dataclass(frozen=True)
class Trained:
    """What a method made of the speaker."""

    policy: TrainedModel
    curve: Curve
    tokens: int
    """Tokens that were generated for it."""


def constant(rate: float) -> OptimizerSettings:
    """Return AdamW at one learning rate."""
    return OptimizerSettings(learning_rate=rate, schedule="constant", warmup_frac=0.0)


def ppo(task: Task, workdir: Path, *, strength: float, iterations: int, seed: int) -> Trained:
    """Train by PPO; the strength is the KL weight."""
    settings = ppo_settings(strength=strength, iterations=iterations, seed=seed)
    critic = Critic(task.critic_directory, settings, Normalization(), seed=seed, value_init=settings.value_init)
    recipe = ppo_recipe(task, critic, settings, scorer=task.rule)
    return _online(recipe.policy, train(recipe, settings, workdir))


def ppo_settings(*, strength: float, iterations: int, seed: int) -> PpoSettings:
    """Return PPO's settings at a KL weight."""
    return PpoSettings.model_validate(
        {
            **ONLINE, "batch_size": RESPONSES_PER_ITERATION, "iterations": iterations, "minibatches": 2,
            "ppo_epochs": 2, "kl_coef": strength, "kl_target_nats": None, "value_init": "zero", "gae_lambda": 0.95,
            "value_learning_rate": 1e-3, "optimizer": constant(5e-4), "seed": seed,
        }
    )  # fmt: skip


def ppo_recipe(task: Task, critic: Critic, settings: PpoSettings, *, scorer: ResponseScorer | None) -> PpoRecipe:
    """Return PPO from the speaker; without a scorer the critic's reward model scores."""
    policy = task.policy(settings)
    return PpoRecipe(
        policy, Reference.of(policy), critic, task.prompts, settings=settings, layout=task.layout, chat=task.chat,
        should_stop=lambda: False, on_text=lambda _: None, scorer=scorer,
    )  # fmt: skip


def rloo(task: Task, workdir: Path, *, strength: float, iterations: int, seed: int) -> Trained:
    """Train by RLOO with four samples a prompt; the strength is beta."""
    settings = RlooSettings.model_validate(
        {
            **ONLINE, "batch_size": RESPONSES_PER_ITERATION // 4, "samples_per_prompt": 4, "iterations": iterations,
            "mu": 2, "minibatches": 2, "beta": strength, "optimizer": constant(5e-4), "seed": seed,
        }
    )  # fmt: skip
    return _group(task, settings, workdir)


def grpo(task: Task, workdir: Path, *, strength: float, iterations: int, seed: int) -> Trained:
    """Train by GRPO with eight samples a prompt; the strength is beta."""
    settings = GrpoSettings.model_validate(
        {
            **ONLINE, "batch_size": RESPONSES_PER_ITERATION // 8, "samples_per_prompt": 8, "iterations": iterations,
            "mu": 2, "minibatches": 2, "beta": strength, "optimizer": constant(5e-4), "seed": seed,
        }
    )  # fmt: skip
    return _group(task, settings, workdir)


def _group(task: Task, settings: GroupSettings, workdir: Path) -> Trained:
    assert isinstance(settings, RlooSettings | GrpoSettings)
    policy = task.policy(settings)
    sampler = GroupSampler(
        policy, Reference.of(policy), GroupRule(task.rule), task.layout, task.chat,
        SamplingSettings(max_new_tokens=settings.max_new_tokens, batch_size=RESPONSES_PER_ITERATION),
        settings.samples_per_prompt, should_stop=lambda: False, on_text=lambda _: None,
    )  # fmt: skip
    recipe = GroupRecipe(sampler, task.prompts, settings=settings, layout=task.layout)
    return _online(policy, train(recipe, settings, workdir))


def _online(policy: TrainedModel, series: list[dict[str, float]]) -> Trained:
    """Take one point an iteration: what its samples showed before they were learnt from."""
    first = {row["iteration"]: row for row in reversed(series)}
    curve = [
        {"responses": iteration * RESPONSES_PER_ITERATION, "score": row["score"], "kl_nats": row["ref_kl_nats"]}
        for iteration, row in sorted(first.items())
    ]
    mean_tokens = sum(row["response_tokens"] for row in first.values())
    return Trained(policy, curve, round(mean_tokens * RESPONSES_PER_ITERATION))


ROUNDS = 5
"""Rounds of the methods that sample, choose and train in turn."""


def raft(task: Task, workdir: Path, *, strength: float, iterations: int, seed: int) -> Trained:
    """Train by RAFT: each round SFT on the best of every n samples; the strength is n."""
    size = int(strength)
    settings = OfflineSettings.model_validate(
        {**SHARED, "batch_size": 32, "max_response_tokens": MAX_NEW_TOKENS, "epochs": 2, "seed": seed,
         "optimizer": constant(1e-3)}
    )  # fmt: skip

    def learn(policy: TrainedModel, trees: list[Tree], score_RK: torch.Tensor) -> None:
        best = score_RK.argmax(1).tolist()
        chosen = [group_tree(i, tree.prompt_ids, [tree.response_ids[k]]) for i, (tree, k) in _pairs(trees, best)]
        train(SftRecipe(policy, DataPlan.of(chosen, settings), task.layout), settings, workdir)

    return _rounds(task, task.policy(settings), size, learn, iterations=iterations, seed=seed)


def iterated_dpo(task: Task, workdir: Path, *, strength: float, iterations: int, seed: int) -> Trained:
    """Train by iterated DPO: each round on the best and worst of four samples, from itself; the strength is beta.

    Small steps and many of them: Adam's step hardly knows the size of the gradient, so at the online methods' rate a
    few large batches a round go far from the start and learn little.
    """
    settings = OfflineSettings.model_validate(
        {**SHARED, "batch_size": 4, "max_response_tokens": MAX_NEW_TOKENS, "epochs": 3, "seed": seed,
         "optimizer": OptimizerSettings(learning_rate=1e-4, schedule="linear", warmup_frac=0.1)}
    )  # fmt: skip
    objective = PREFERENCE_LOSSES.build({"name": "dpo", "beta": strength})

    def learn(policy: TrainedModel, trees: list[Tree], score_RK: torch.Tensor) -> None:
        ends = list(zip(score_RK.argmax(1).tolist(), score_RK.argmin(1).tolist(), strict=True))
        pairs = [
            group_tree(i, tree.prompt_ids, [tree.response_ids[best], tree.response_ids[worst]])
            for i, (tree, (best, worst)) in _pairs(trees, ends)
            if score_RK[i, best] > score_RK[i, worst]
        ]
        reference = {name: tuple(row) for name, row in response_logps(policy.model, pairs, task.layout).items()}
        nan = (float("nan"), float("nan"))
        judged = {tree.record_id: Judgement((1, 2), nan, (True, False)) for tree in pairs}
        recipe = PreferenceRecipe(
            policy, DataPlan.of(pairs, settings), task.layout, objective=objective, judgements=judged,
            reference=reference,
        )  # fmt: skip
        train(recipe, settings, workdir)

    return _rounds(task, task.policy(settings), 4, learn, iterations=iterations, seed=seed)


def _pairs(trees: list[Tree], others: list[Any]) -> list[tuple[int, tuple[Tree, Any]]]:
    return list(enumerate(zip(trees, others, strict=True)))


def _rounds(
    task: Task,
    policy: TrainedModel,
    size: int,
    learn: Callable[[TrainedModel, list[Tree], torch.Tensor], None],
    *,
    iterations: int,
    seed: int,
) -> Trained:
    """Sample, score and learn in rounds, with as many responses as the iterations of the online methods."""
    curve: Curve = []
    tokens = 0
    groups = iterations * RESPONSES_PER_ITERATION // ROUNDS // size
    plan = DataPlan.of(task.prompts, OfflineSettings(batch_size=groups, seed=seed))
    for number in range(ROUNDS):
        found = measure(task, policy, samples=8, seed=derive_seed(seed, "curve", number))
        responses = number * groups * size
        curve.append({"responses": responses, "score": found.score, "kl_nats": found.kl_nats})
        prompts = plan.full_batch(number)
        drawn: list[Sample] = sample(
            policy.model, [tree.prompt_ids for tree in prompts],
            SamplingSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=256), eos_id=task.chat.eos_id,
            pad_id=task.chat.pad_id, seed=derive_seed(seed, "round", number), samples_per_prompt=size,
        )  # fmt: skip
        tokens += sum(len(one.ids) for one in drawn)
        trees = [
            group_tree(index, tree.prompt_ids, [one.ids for one in drawn[index * size : (index + 1) * size]])
            for index, tree in enumerate(prompts)
        ]
        score_R, _ = task.rule.of(trees, [one.is_finished for one in drawn])
        learn(policy, trees, score_R.view(-1, size))
    return Trained(policy, curve, tokens)


def best_of_n(task: Task, *, seed: int, samples: int = 256) -> Curve:
    """Estimate best-of-n of the speaker for growing n, without bias, from samples drawn once."""
    rows = draw(task, task.speaker(), samples=samples, seed=seed).scores.view(-1, samples).tolist()
    sizes = [2**power for power in range(samples.bit_length())]
    return [
        {"n": n, "score": sum(expected_best(row, n=n) for row in rows) / len(rows), "kl_nats": kl_nats(n)}
        for n in sizes
    ]


METHODS: dict[str, Callable[..., Trained]] = {
    "ppo": ppo, "rloo": rloo, "grpo": grpo, "raft": raft, "iterated_dpo": iterated_dpo
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, measured at its end on fresh samples."""

    trained: Trained
    shown: Measured

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"curve": self.trained.curve, "tokens": self.trained.tokens, **asdict(self.shown)}


def run(name: str, task: Task, workdir: Path, *, strength: float, iterations: int, seed: int) -> Run:
    """Train by one method and measure what it came to."""
    trained = METHODS[name](task, workdir, strength=strength, iterations=iterations, seed=seed)
    shown = measure(task, trained.policy, samples=SAMPLES_MEASURED, seed=derive_seed(seed, "measure"))
    last = {"responses": iterations * RESPONSES_PER_ITERATION, "score": shown.score, "kl_nats": shown.kl_nats}
    return Run(Trained(trained.policy, [*trained.curve, last], trained.tokens), shown)
