"""A whole step of PPO against plain forwards and loops: rewards, whitening, advantages, both losses, every gradient.

The expected loss is made anew from the sampled ids: one row a forward of the plain models, everything
between their outputs and the loss in Python loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.models.tiny import write_tiny_model
from pipeline_lib.training.recipes.ppo import PpoRecipe
from tests.toy import World, ppo_recipe, ppo_settings, write_reward_model

GAIN, BIAS = 2.0, 0.5
"""Of the reward model, as `tests.toy` normalises it."""
COMMON: dict[str, Any] = {
    "temperature": 0.7, "kl_coef": 0.3, "kl_target_nats": None, "gamma": 0.9, "gae_lambda": 0.8, "value_coef": 0.3,
    "clip_range": 0.02, "value_clip_range": 0.05, "minibatches": 2, "missing_eos": "penalty", "missing_eos_value": -0.4,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"whiten_rewards": False, "whiten_advantages": False},
    "whitened": {"whiten_rewards": True, "whiten_advantages": True},
    "unbiased-k3": {"whiten_rewards": True, "whiten_variance": "unbiased", "kl_estimator": "k3"},
    "zero-value": {"value_init": "zero", "kl_estimator": "k2", "missing_eos": "replace"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    policy = tmp_path_factory.mktemp("policy")
    write_tiny_model(policy, seed=0)
    return policy, write_reward_model(policy, tmp_path_factory.mktemp("reward"))


@dataclass
class Row:
    """A rollout's numbers under the weights that sampled it, by plain forwards."""

    place: int
    prompt: list[int]
    response: list[int]
    old_logp: list[float]
    ref_logp: list[float]
    old_value: list[float]
    score: float

    @property
    def ids(self) -> Tensor:
        return torch.tensor([[*self.prompt, *self.response]])

    @property
    def steps(self) -> slice:
        """The positions that predict the response."""
        return slice(len(self.prompt) - 1, len(self.prompt) + len(self.response) - 1)


def logps(model: Any, row: Row, temperature: float) -> Tensor:
    scores_TV = torch.log_softmax(model(row.ids).logits[0, row.steps] / temperature, -1)
    logp_T: Tensor = scores_TV[torch.arange(len(row.response)), torch.tensor(row.response)]
    return logp_T


def values(recipe: PpoRecipe, row: Row) -> Tensor:
    with recipe.critic.valuing() as model:
        hidden_TD = model.base_model(row.ids).last_hidden_state[0, row.steps]
    raw_T: Tensor = (hidden_TD @ recipe.critic.value_head_1D.T)[:, 0]
    return raw_T if recipe.settings.value_init == "zero" else GAIN * raw_T + BIAS


def sampled(recipe: PpoRecipe) -> Iterator[Row]:
    """Every rollout of the first iteration, measured anew before anything moves."""
    rollouts = recipe.rollouts
    assert rollouts is not None
    for place, tree in enumerate(rollouts.trees):
        row = Row(place, list(tree.prompt_ids), list(tree.response_ids[0]), [], [], [], float(rollouts.score_R[place]))
        with torch.no_grad():
            row.old_logp = logps(recipe.policy.model, row, recipe.settings.temperature).tolist()
            with recipe.reference.active() as reference:
                row.ref_logp = logps(reference, row, recipe.settings.temperature).tolist()
            row.old_value = values(recipe, row).tolist()
        yield row


def k(kind: str, d: float) -> float:
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]


def whitened(rows: list[list[float]], *, shift: bool, unbiased: bool) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - unbiased)
    return [[(x - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean) for x in row] for row in rows]


def targets(recipe: PpoRecipe, rows: list[Row]) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of a minibatch."""
    chosen = recipe.settings
    unbiased = chosen.whiten_variance == "unbiased"
    rewards = []
    for row in rows:
        score = row.score
        if row.response[-1] != recipe.chat.eos_id:
            score = chosen.missing_eos_value + (score if chosen.missing_eos == "penalty" else 0.0)
        penalties = [-0.3 * k(chosen.kl_estimator, a - b) for a, b in zip(row.old_logp, row.ref_logp, strict=True)]
        rewards.append([*penalties[:-1], penalties[-1] + score])
    if chosen.whiten_rewards:
        rewards = whitened(rewards, shift=False, unbiased=unbiased)
    advantages = []
    for row, reward in zip(rows, rewards, strict=True):
        v = [*row.old_value, 0.0]
        delta = [r + 0.9 * v[t + 1] - v[t] for t, r in enumerate(reward)]
        advantages.append([sum(0.72**n * x for n, x in enumerate(delta[t:])) for t in range(len(delta))])
    pairs = zip(advantages, rows, strict=True)
    returns = [[a + v for a, v in zip(each, row.old_value, strict=True)] for each, row in pairs]
    if chosen.whiten_advantages:
        advantages = whitened(advantages, shift=True, unbiased=unbiased)
    return advantages, returns


def expected_loss(recipe: PpoRecipe, rows: list[Row]) -> Tensor:
    """mean max(-A ratio, -A clip ratio) + c_v / 2 mean max((v - R)^2, (clip v - R)^2) over the minibatch's tokens."""
    policy, value, tokens = torch.zeros(()), torch.zeros(()), 0
    for row, advantage, target in zip(rows, *targets(recipe, rows), strict=True):
        ratio_T = (logps(recipe.policy.model, row, 0.7) - torch.tensor(row.old_logp)).exp()
        a_T, r_T, old_T = (torch.tensor(each) for each in (advantage, target, row.old_value))
        policy = policy + torch.maximum(-a_T * ratio_T, -a_T * ratio_T.clamp(0.98, 1.02)).sum()
        new_T = values(recipe, row)
        kept_T = torch.minimum(torch.maximum(new_T, old_T - 0.05), old_T + 0.05)
        value = value + 0.5 * torch.maximum((new_T - r_T) ** 2, (kept_T - r_T) ** 2).sum()
        tokens += len(row.response)
    return (policy + 0.3 * value) / tokens


@pytest.mark.parametrize("name", list(VARIANTS))
def test_loss_and_gradients_of_a_step(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    chosen = ppo_settings(**(COMMON | VARIANTS[name]))
    recipe = ppo_recipe(*folders, chosen, world=World.at(tmp_path))
    recipe.micro_batches(0)
    rows = list(sampled(recipe))
    parameters = {
        f"{group.name}/{key}": value for group in recipe.parameter_groups() for key, value in group.parameters.items()
    }
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as after some steps: neither the ratio is 1 nor the values are the old ones
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batches = recipe.micro_batches(1)
    found, clipped = torch.zeros(()), 0.0
    for batch in batches:
        with recipe.training_forward(batch):
            result = recipe.loss(batch, batches)
            result.loss.backward()
        found = found + result.loss.detach()
        clipped += sum(figure.total for name, figure in result.figures.items() if name.endswith("clip_frac"))
    assert clipped > 2, "a test of clipped losses in which nothing is clipped"
    members = sorted({int(tree.record_id.rpartition(":")[2]) for batch in batches for tree in batch.trees})
    assert len(members) == chosen.batch_size // 2
    own = {key: value.grad.clone() for key, value in parameters.items() if value.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    expected = expected_loss(recipe, [rows[place] for place in members])
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert own.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        apart = float((own[key] - parameter.grad).abs().max())
        assert apart <= 2e-5 + 2e-3 * float(parameter.grad.abs().max()), f"{key}: gradients differ by {apart:.1e}"
