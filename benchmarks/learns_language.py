"""PPO on SmolLM2-135M against a reward model; a second one, of other pairs, only measures.

Policy, reference, reward model (the proxy) and value function are one base with adapters, as the PPO stage has them.
Held-out prompts are answered before and after with the same seed, and both reward models score both;
intervals are the gate's bootstrap over prompts, paired where before and after are compared.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from benchmarks.learns_language_models import (
    TOKENS_PER_BATCH,
    Preparation,
    Prepared,
    Spent,
    prepare_models,
    timed,
)
from benchmarks.learns_methods import constant
from benchmarks.learns_task import train
from pipeline_lib.evaluation.stats import Bootstrap, difference_of_means, interval, mean
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.schema import Interval
from pipeline_lib.training.critic import Critic, FrozenRewardModel
from pipeline_lib.training.recipes.ppo import PpoRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.rollout import Rollouts
from pipeline_lib.training.sampling_rollouts import prompt_trees
from pipeline_lib.training.settings import PpoSettings
from pipeline_lib.training.trained_model import prepare
from pipeline_lib.validation import Frozen

KL_LIMIT_NATS = 10.0
MEASURED = 1_000_000
"""The iteration whose seed the held-out prompts are answered by: none that is trained on."""
SHOWN = 4
"""Prompts whose answers are shown, before and after."""
CURVE = ("score", "heldout_score", "ref_kl_nats", "response_tokens", "finished_frac", "entropy_nats")


class Training(Frozen):
    """How the policy is trained."""

    iterations: int = Field(7, ge=1)
    rollouts: int = Field(32, ge=2)
    """Of an iteration, one a prompt."""
    minibatches: int = 2
    ppo_epochs: int = 2
    learning_rate: float = 5e-4
    kl_coef: float = 0.05

    def settings(self, plan: Preparation) -> PpoSettings:
        """Return PPO's settings; scores have deviation 1.

        Answers are short: no discount, and a value function that starts from 0, since what the reward model says of
        half an answer is noise. An answer without an end keeps its score, which is low enough: -3 to -5 was measured.
        """
        return PpoSettings(
            precision="fp32", tokens_per_batch=TOKENS_PER_BATCH, max_prompt_tokens=plan.max_prompt_tokens,
            max_new_tokens=plan.max_new_tokens, iterations=self.iterations, batch_size=self.rollouts,
            minibatches=self.minibatches, ppo_epochs=self.ppo_epochs, kl_coef=self.kl_coef, kl_target_nats=None,
            optimizer=constant(self.learning_rate), seed=plan.seed,
            value_init="zero", gae_lambda=1.0, missing_eos="keep",
        )  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What one answer to each held-out prompt shows, prompt by prompt."""

    response_ids: list[tuple[int, ...]]
    score_by_model: dict[str, list[float]]
    """`proxy` and `heldout`, normalised."""
    kl_nats: list[float]
    """log pi / pi_ref of the answer."""
    is_finished: list[bool]
    entropy_nats: float
    """Mean over all tokens."""

    @classmethod
    def of(cls, rollouts: Rollouts) -> Answers:
        """Take it from rollouts of one response a prompt."""
        assert rollouts.heldout_score_R is not None, "a held-out reward model measures"
        ids = [tree.response_ids[0] for tree in rollouts.trees]
        kl_N = (rollouts.logp_N - rollouts.ref_logp_N).double()
        return cls(
            ids, {"proxy": rollouts.score_R.tolist(), "heldout": rollouts.heldout_score_R.tolist()},
            [float(row.sum()) for row in kl_N.split([len(one) for one in ids])], rollouts.is_finished_R.tolist(),
            float(rollouts.entropy_N.mean()),
        )  # fmt: skip


def language(
    folder: Path, *, work: Path | None, plan: Preparation, training: Training, rows_folder: Path
) -> dict[str, Any]:
    """Make start and reward models, train the policy, and return what the held-out prompts show.

    Args:
        folder: An empty folder.
        work: Where start and reward models are kept; None: in that folder.
        plan: What they are made from.
        training: How the policy is trained.
        rows_folder: Where the rows of `hh` are.
    """
    prepared = prepare_models(plan, work or folder, rows_folder=rows_folder)
    with timed() as measuring:
        settings = training.settings(plan)
        recipe = ppo_recipe(prepared, settings)
        before = measure(recipe, prepared)
    print(f"start: score {statistics.fmean(before.score_by_model['proxy']):.2f}", flush=True)
    with timed() as ppo:
        series = train(recipe, settings, folder, on_step=lambda step: tell(recipe, step))
    with timed() as measuring_again:
        after = measure(recipe, prepared)
    found = compare(before, after)
    print(found, flush=True)
    spent = {**prepared.spent, "measure_before": measuring[0], "ppo": ppo[0], "measure_after": measuring_again[0]}
    is_reached = all(found["verdicts"].values())
    return {
        **found, "kind": plan.kind, "sizes": plan.sizes.model_dump(), "training": training.model_dump(),
        "kl_limit_nats": KL_LIMIT_NATS, "curve": curve(series), "spent": _plain_times(spent),
        "test_accuracy_frac": {
            "proxy": prepared.proxy.test_accuracy_frac, "heldout": prepared.heldout.test_accuracy_frac
        },
        "samples": shown(prepared, before, after), "runs": [{"method": "ppo", "is_reached": is_reached}],
    }  # fmt: skip


def ppo_recipe(prepared: Prepared, settings: PpoSettings) -> PpoRecipe:
    """Return PPO from the start against the proxy."""
    start, proxy, heldout = prepared.start, prepared.proxy, prepared.heldout
    policy = prepare(load_causal_model(start, dtype=torch.float32), start, settings, seed=settings.seed)
    critic = Critic.on_policy(
        policy, proxy.stored, proxy.normalization, seed=settings.seed + 1, value_init=settings.value_init
    )
    return PpoRecipe(
        policy, Reference.of(policy), critic, prompt_trees(prepared.encoder, prepared.rows.policy), settings=settings,
        layout=prepared.layout, chat=prepared.encoder.chat, should_stop=lambda: False, on_text=lambda _: None,
        heldout=FrozenRewardModel.on_policy(policy, heldout.stored, heldout.normalization),
    )  # fmt: skip


def tell(recipe: PpoRecipe, step: int) -> None:
    """Print what the rollouts of an iteration showed, once it is over."""
    if (step + 1) % recipe.steps_per_iteration == 0:
        shown_now = ", ".join(f"{name} {recipe.iteration_figures[name]:.2f}" for name in CURVE)
        print(f"iteration {(step + 1) // recipe.steps_per_iteration}: {shown_now}", flush=True)


def measure(recipe: PpoRecipe, prepared: Prepared) -> Answers:
    """Let the policy, as it is now, answer the held-out prompts at temperature 1."""
    return Answers.of(recipe.collector.collect(prompt_trees(prepared.encoder, prepared.rows.test), MEASURED))


def compare(before: Answers, after: Answers) -> dict[str, Any]:
    """Return scores before and after, their paired differences and the KL, with intervals over prompts."""
    found: dict[str, Any] = {
        "kl_nats": _plain(interval([after.kl_nats], mean, Bootstrap())),
        "agreement": statistics.correlation(before.score_by_model["proxy"], before.score_by_model["heldout"]),
    }
    for name, old in before.score_by_model.items():
        new = after.score_by_model[name]
        found[name] = {
            "before": _plain(interval([old], mean, Bootstrap())),
            "after": _plain(interval([new], mean, Bootstrap())),
            "gain": _plain(interval([new, old], difference_of_means, Bootstrap())),
        }
    for name, answers in (("before", before), ("after", after)):
        found[f"tokens_{name}"] = statistics.fmean(map(len, answers.response_ids))
        found[f"finished_frac_{name}"] = statistics.fmean(answers.is_finished)
        found[f"entropy_nats_{name}"] = answers.entropy_nats
    verdicts = {
        "is_up_apart": found["proxy"]["after"]["low"] > found["proxy"]["before"]["high"],
        "is_near": found["kl_nats"]["high"] <= KL_LIMIT_NATS,
        "is_heldout_not_down": found["heldout"]["gain"]["value"] >= 0,
    }
    return {**found, "verdicts": verdicts}


def curve(series: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return what each iteration's rollouts showed, and its clip fraction and explained variance at its last step."""
    last = {row["iteration"]: row for row in series}
    names = ("iteration", *CURVE, "clip_frac", "explained_variance_frac")
    return [{name: row[name] for name in names} for _, row in sorted(last.items())]


def shown(prepared: Prepared, before: Answers, after: Answers) -> list[dict[str, str]]:
    """Return a few answers side by side."""
    asked = {row.id: row.messages[-1].content for row in prepared.rows.test}
    prompts = prompt_trees(prepared.encoder, prepared.rows.test)
    decode = prepared.encoder.chat.decode
    return [
        {
            "prompt": asked[prompt.record_id], "before": decode(list(old)), "after": decode(list(new))
        }
        for prompt, old, new in list(zip(prompts, before.response_ids, after.response_ids, strict=True))[:SHOWN]
    ]  # fmt: skip


def _plain(found: Interval) -> dict[str, Any]:
    return found.model_dump(include={"value", "low", "high"})


def _plain_times(spent: dict[str, Spent]) -> dict[str, dict[str, float]]:
    return {name: one.model_dump() for name, one in spent.items()}
