"""PPO: it starts as its reference, learns a rule, is stopped when it runs away, and does not depend on layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline_lib.errors import DivergedError
from pipeline_lib.models.adapters import without_adapter
from pipeline_lib.models.heads import head_of, load_scalar_model
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.rl.rewards import apply_missing_eos
from pipeline_lib.text.pack import TreeBatch, pack
from pipeline_lib.training.critic import Critic, Normalization
from pipeline_lib.training.recipes.ppo import VALUE, PpoRecipe
from pipeline_lib.training.rollout import ValuedRollouts, rollout_tree
from pipeline_lib.training.settings import PpoSettings
from tests.toy import (
    PPO_PROMPTS,
    World,
    byte_ids,
    furthest,
    of_one_iteration,
    ppo_recipe,
    ppo_settings,
    settings,
    weights_of,
)


def run(recipe: PpoRecipe, chosen: PpoSettings, world: World) -> list[dict[str, float]]:
    return world.loop(recipe, chosen).run()


def share_of_letters(batch: TreeBatch) -> Tensor:
    """A rule as a reward: the share of a response's tokens that are lower-case letters."""
    letters = torch.tensor(byte_ids("abcdefghijklmnopqrstuvwxyz"))
    return torch.tensor(
        [float(torch.isin(torch.tensor(tree.response_ids[0]), letters).float().mean()) for tree in batch.trees]
    )


def test_the_first_rollouts_have_no_kl(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings()
    series = run(ppo_recipe(directory, reward_directory, chosen, world=world), chosen, world)
    assert abs(series[0]["ref_kl_nats"]) <= 1e-5
    assert series[0]["approx_kl_nats"] <= 1e-9
    assert series[0]["clip_frac"] == 0.0
    assert abs(series[4]["ref_kl_nats"]) > 1e-5
    assert [row["iteration"] for row in series] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_rollouts_are_what_the_models_say_of_them(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(temperature=0.7)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world, tokens_per_batch=64)
    rollouts = of_one_iteration(recipe)
    assert len(rollouts.trees) == 6
    scorer = load_scalar_model(reward_directory, dtype=torch.float32).eval()
    for index, tree in enumerate(rollouts.trees):
        whole = torch.tensor([[*tree.prompt_ids, *tree.response_ids[0]]])
        first = len(tree.prompt_ids)
        with torch.no_grad():
            logits_TV = recipe.policy.model(whole).logits[0, first - 1 : -1] / 0.7
            hidden_TD = scorer.base_model(whole).last_hidden_state[0]
            score_T = (hidden_TD @ head_of(scorer).weight.T)[:, 0] * 2.0 + 0.5
        logp_TV = torch.log_softmax(logits_TV, dim=-1)
        logp_T = logp_TV.gather(1, whole[0, first:, None])[:, 0]
        torch.testing.assert_close(rollouts.rows(rollouts.logp_N)[index], logp_T, rtol=0, atol=1e-5)
        entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
        torch.testing.assert_close(rollouts.rows(rollouts.entropy_N)[index], entropy_T, rtol=0, atol=1e-5)
        assert float(rollouts.score_R[index]) == pytest.approx(float(score_T[-1]), abs=1e-5)
        # The value starts as the reward model's score of the text before each token.
        torch.testing.assert_close(rollouts.rows(rollouts.value_N)[index], score_T[first - 1 : -1], rtol=0, atol=1e-5)
        assert bool(rollouts.is_finished_R[index]) == (tree.response_ids[0][-1] == 2)


def rewarded_by_rule(
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch, **changes: object
) -> tuple[PpoRecipe, PpoSettings]:
    """PPO of all weights with the rule as its reward, at a rate that shows within a few iterations."""
    chosen = ppo_settings(
        adapter=None, batch_size=32, ppo_epochs=4, kl_target_nats=None, missing_eos="keep", clip_range=0.4,
        gae_lambda=1.0, optimizer={"learning_rate": 1e-2, "schedule": "constant", "warmup_frac": 0.0}, **changes,
    )  # fmt: skip
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    # The values start near 0: the random reward model they come from knows nothing of the rule.
    recipe.critic.normalization = Normalization(gain=0.1)
    monkeypatch.setattr(recipe.critic, "scores", share_of_letters)
    return recipe, chosen


def test_a_rule_is_learnt_unless_the_kl_weight_forbids(
    directory: Path, reward_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, kl_nats = {}, {}
    for kl_coef in (0.0, 0.5):
        recipe, chosen = rewarded_by_rule(
            directory, reward_directory, World.at(tmp_path / str(kl_coef)), monkeypatch,
            iterations=6, kl_coef=kl_coef,
        )  # fmt: skip
        series = run(recipe, chosen, World.at(tmp_path / str(kl_coef)))[:: recipe.steps_per_iteration]
        score[kl_coef] = [row["score"] for row in series]
        kl_nats[kl_coef] = [row["ref_kl_nats"] for row in series]
    assert score[0.0][0] == score[0.5][0] < 0.25, "26 of 259 tokens are letters"
    assert score[0.0][-1] > score[0.0][0] + 0.4
    assert score[0.0] == sorted(score[0.0])
    assert score[0.5][-1] < score[0.0][-1] / 2
    assert kl_nats[0.0][-1] > 3 * kl_nats[0.5][-1]


def test_a_kl_explosion_stops_with_its_figures(
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, chosen = rewarded_by_rule(
        directory, reward_directory, world, monkeypatch, iterations=4, kl_coef=0.0, max_kl_nats=0.5
    )
    with pytest.raises(
        DivergedError, match=r"KL explosion in iteration [234]: \d+\.\d nats .* limit is 0\.5"
    ) as caught:
        run(recipe, chosen, world)
    assert "kl_coef" in caught.value.next_step


def test_advantages_and_weights_do_not_depend_on_the_layout(
    directory: Path, reward_directory: Path, tmp_path: Path
) -> None:
    chosen = ppo_settings(whiten_rewards=True, optimizer={"learning_rate": 1e-3, "epsilon": 1e-4})
    found = []
    for name, tokens, is_packed in (("one", 4096, True), ("many", 16, True), ("padded", 16, False)):
        world = World.at(tmp_path / name)
        recipe = ppo_recipe(
            directory, reward_directory, chosen, world=world, tokens_per_batch=tokens, is_packed=is_packed
        )
        forwards = len(recipe.micro_batches(0))
        assert forwards == (2 if tokens == 4096 else 6), "as many of the value function"
        advantages = {f"{index}": values for index, values in recipe._advantages.items()}
        world.loop(recipe, chosen).run()
        found.append((advantages, weights_of(recipe)))
    for other in found[1:]:
        assert furthest(found[0][0], other[0]) <= 1e-4  # whitening divides by a small spread
        assert furthest(found[0][1], other[1]) <= 1e-5


def test_minibatches_share_out_the_rollouts_once_a_pass(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(minibatches=4, ppo_epochs=2, batch_size=6)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    assert recipe.num_steps == 16
    passes = []
    for first in (0, 4):
        members = [
            tree.record_id for step in range(first, first + 4) for b in recipe.micro_batches(step) for tree in b.trees
        ]
        assert sorted(members) == sorted(VALUE * is_value + str(n) for n in range(6) for is_value in (0, 1))
        passes.append(members)
    assert passes[0] != passes[1]


def test_few_prompts_still_fill_every_iteration(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(batch_size=7, minibatches=3, iterations=3, ppo_epochs=1)
    assert len(PPO_PROMPTS) == 8
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    assert len(run(recipe, chosen, world)) == 9
    assert len(of_one_iteration(recipe).trees) == 7


def test_more_minibatches_than_rollouts_are_refused() -> None:
    with pytest.raises(ValidationError, match="minibatches = 5 is more than batch_size = 4"):
        ppo_settings(minibatches=5, batch_size=4)


@pytest.mark.parametrize(
    ("mode", "expected"), [("keep", [1.5, 0.25, -2.0]), ("replace", [1.5, -1.0, -1.0]), ("penalty", [1.5, -0.75, -3.0])]
)
def test_scores_of_unfinished_responses(
    mode: str, expected: list[float], directory: Path, reward_directory: Path, world: World
) -> None:
    """By hand through the recipe: gamma = lambda = 1 and values 0, so the advantage is the changed score."""
    chosen = ppo_settings(
        missing_eos=mode, kl_coef=0.0, gamma=1.0, gae_lambda=1.0, whiten_advantages=False, batch_size=3, minibatches=1
    )
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    trees = tuple(rollout_tree(index, [5, 6], [7, 8]) for index in range(3))
    zeros_N = torch.zeros(6)
    rollouts = ValuedRollouts(
        trees, zeros_N, zeros_N, zeros_N, torch.tensor([1.5, 0.25, -2.0]), torch.tensor([True, False, False]),
        value_N=zeros_N,
    )  # fmt: skip
    recipe._finish_iteration(0, rollouts)
    recipe._estimate_advantages(rollouts, [0, 1, 2])
    assert [recipe._advantages[index].tolist() for index in range(3)] == [[value] * 2 for value in expected]
    assert apply_missing_eos(
        rollouts.score_R, rollouts.is_finished_R, mode=chosen.missing_eos, value=-1.0
    ).tolist() == expected  # fmt: skip


def test_kept_samples_tell_prompt_response_and_score(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings()
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    run(recipe, chosen, world)
    rows = [json.loads(row) for row in recipe.samples]
    assert [row["iteration"] for row in rows] == [0] * 6 + [1] * 6
    assert all({"prompt", "response", "score"} <= row.keys() for row in rows)


def test_the_reward_model_and_the_reference_stay_as_they_are(
    directory: Path, reward_directory: Path, world: World
) -> None:
    chosen = ppo_settings(iterations=3)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    batch = pack([rollout_tree(0, byte_ids("hello"), byte_ids("you"))])

    def measure() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), recipe.reference.active() as reference:
            ref = token_logps(reference, batch).token_logp_N
        with torch.no_grad():
            return ref, recipe.critic.scores(batch), recipe.critic.values(batch)

    before = measure()
    run(recipe, chosen, world)
    after = measure()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert float((before[2] - after[2]).abs().max()) > 1e-4, "the value function should have learnt"


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_the_critic_starts_as_the_reward_model_in_both_forms(
    adapter: dict[str, int] | None, reward_directory: Path
) -> None:
    critic = Critic(reward_directory, settings(adapter=adapter), Normalization(gain=3.0, bias=-1.0), seed=0)
    scorer = load_scalar_model(reward_directory, dtype=torch.float32).eval()
    batch = pack([rollout_tree(0, byte_ids("hello"), byte_ids("you"))])
    with torch.no_grad():
        expected = 3.0 * float(scorer(torch.tensor([byte_ids("helloyou")])).logits[0, 0]) - 1.0
        before_last = 3.0 * float(scorer(torch.tensor([byte_ids("helloyo")])).logits[0, 0]) - 1.0
        assert float(critic.scores(batch)[0]) == pytest.approx(expected, abs=1e-5)
        assert float(critic.values(batch)[-1]) == pytest.approx(before_last, abs=1e-5)
    group = critic.group(learning_rate=0.1)
    assert "value_head" in group.parameters
    assert (adapter is None) == any("embed_tokens" in name for name in group.parameters)
    assert "score.weight" not in group.parameters


def test_without_an_adapter_the_reference_is_a_frozen_copy(
    directory: Path, reward_directory: Path, world: World
) -> None:
    chosen = ppo_settings(adapter=None)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    with recipe.reference.active() as reference, without_adapter(None):
        assert reference is not recipe.policy.model
        assert not any(parameter.requires_grad for parameter in reference.parameters())
