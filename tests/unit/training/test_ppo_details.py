"""The details of RLHF with PPO that are options (docs/methods/ppo.md), each against a number of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline_lib.errors import ConfigError
from pipeline_lib.hashing import derive_seed
from pipeline_lib.models.heads import head_of, init_head
from pipeline_lib.models.sampling import Sample, SamplingSettings, sample
from pipeline_lib.rl.kl import full_kl
from pipeline_lib.text.pack import pack
from pipeline_lib.training import collection
from pipeline_lib.training.collection import PROCESS_SEED_STRIDE, token_id
from pipeline_lib.training.optimizer import build_optimizer, epsilon_at
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.recipes.ppo import is_valued
from pipeline_lib.training.rollout import rollout_tree
from pipeline_lib.training.settings import OptimizerSettings
from tests.toy import (
    World,
    byte_ids,
    chat,
    of_one_iteration,
    ppo_recipe,
    ppo_settings,
    reward_model_of,
    settings,
    tiny_llama,
)

END, PAD = 2, 0
DOT = byte_ids(".")[0]


def responses_are(monkeypatch: pytest.MonkeyPatch, *responses: list[int]) -> None:
    """Let the policy have said these, in turn."""

    class Said:
        def generate(self, prompts: Sequence[Any], chosen: Any, **_: Any) -> list[Sample]:
            picked = [responses[index % len(responses)] for index in range(len(prompts))]
            return [Sample(tuple(ids), END in ids) for ids in picked]

        def update(self, policy: Any) -> None: ...

    monkeypatch.setattr(collection, "open_generator", lambda *_, **__: Said())


# 2, 3: padding -------------------------------------------------------------------------------------


def test_padding_changes_no_figure(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(temperature=0.7)
    packed = of_one_iteration(ppo_recipe(directory, reward_directory, chosen, world=world))
    padded = of_one_iteration(ppo_recipe(directory, reward_directory, chosen, world=world, is_packed=False))
    assert packed.trees == padded.trees
    assert len({len(tree.prompt_ids) for tree in packed.trees}) > 1, "the padding should differ from row to row"
    for name in ("logp_N", "ref_logp_N", "value_N", "entropy_N", "full_kl_N", "score_R"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), rtol=0, atol=1e-5, msg=name)


# 4: lengths ----------------------------------------------------------------------------------------


def ended_at_once() -> Any:
    """A model that would end every turn at once."""
    model = tiny_llama(seed=4)
    head = torch.nn.Linear(64, 259)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[END] = 20.0
    model.lm_head = head
    return model.eval()


@pytest.mark.parametrize("least", [0, 1, 5])
def test_a_response_has_its_least_length(least: int) -> None:
    chosen = SamplingSettings(max_new_tokens=8, min_new_tokens=least)
    prompts = [byte_ids("a"), byte_ids("hello")]
    for drawn in sample(ended_at_once(), prompts, chosen, eos_id=END, pad_id=PAD, seed=0):
        assert drawn.ids.index(END) == len(drawn.ids) - 1 == least
        assert drawn.is_finished


def test_without_stopping_every_response_has_its_full_length() -> None:
    chosen = SamplingSettings(max_new_tokens=8, stops_at_eos=False)
    for drawn in sample(ended_at_once(), [byte_ids("a"), byte_ids("hello")], chosen, eos_id=END, pad_id=PAD, seed=0):
        assert len(drawn.ids) == 8
        assert drawn.ids[0] == END


def test_what_follows_an_end_is_trained_on_but_not_scored(
    directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses_are(monkeypatch, [*byte_ids("ab"), END, *byte_ids("xyz")], byte_ids("abcdef"))
    chosen = ppo_settings(stops_at_eos=False, batch_size=2, minibatches=1)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    rollouts = of_one_iteration(recipe)
    assert rollouts.lengths_R == [6, 6]
    assert rollouts.is_finished_R.tolist() == [True, False]
    prompt = list(rollouts.trees[0].prompt_ids)
    alone = recipe.critic.scores(pack([rollout_tree(0, prompt, [*byte_ids("ab"), END])]))
    assert float(rollouts.score_R[0]) == pytest.approx(float(alone[0]), abs=1e-5)


# 5, 21: rate and epsilon ---------------------------------------------------------------------------


def test_the_learning_rate_falls_linearly_to_0(directory: Path, reward_directory: Path, world: World) -> None:
    optimizer = OptimizerSettings(learning_rate=1e-3, schedule="linear", warmup_frac=0.0)
    chosen = ppo_settings(optimizer=optimizer)
    series = world.loop(ppo_recipe(directory, reward_directory, chosen, world=world), chosen).run()
    assert [row["learning_rate"] for row in series] == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])


def test_tensorflows_epsilon_is_added_before_the_bias_correction() -> None:
    """TF1: w -= rate * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + e), worked out beside torch's optimizer."""
    chosen = OptimizerSettings(learning_rate=0.1, epsilon=1e-2, betas=(0.9, 0.999), epsilon_form="tensorflow")
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer([ParameterGroup("w", {"w": weight}, 0.1)], chosen)
    expected, m, v = 1.0, 0.0, 0.0
    for step, gradient in enumerate([0.05, -0.02, 0.3]):
        optimizer.param_groups[0]["eps"] = epsilon_at(step, chosen)
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        t = step + 1
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected -= 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + 1e-2)
        assert weight.item() == pytest.approx(expected, rel=1e-9)
    assert epsilon_at(0, chosen.model_copy(update={"epsilon_form": "torch"})) == 1e-2
    with pytest.raises(ValidationError, match="one of adamw, not of rmsprop"):
        OptimizerSettings(name="rmsprop", epsilon_form="tensorflow")


def test_the_loop_gives_the_optimizer_its_epsilon(directory: Path, reward_directory: Path, world: World) -> None:
    optimizer = OptimizerSettings(learning_rate=1e-3, epsilon=1e-5, betas=(0.9, 0.999), epsilon_form="tensorflow")
    chosen = ppo_settings(iterations=1, ppo_epochs=1, minibatches=1, optimizer=optimizer)
    loop = world.loop(ppo_recipe(directory, reward_directory, chosen, world=world), chosen)
    loop.run()
    assert loop.optimizer.param_groups[0]["eps"] == pytest.approx(1e-5 / math.sqrt(0.001), rel=1e-9)


# 6: seeds ------------------------------------------------------------------------------------------


def test_each_processes_share_is_drawn_from_its_own_seed(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(process_seeds="rank_offset")
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    prompts = recipe.plan.full_batch(0)
    found = replace(recipe.collector, num_processes=2).collect(prompts, 0)
    for rank in (0, 1):
        share = prompts[rank::2]
        drawn = sample(
            recipe.policy.model, [tree.prompt_ids for tree in share], SamplingSettings(max_new_tokens=8),
            eos_id=END, pad_id=PAD, seed=derive_seed(chosen.seed + rank * 100_003, "rollout", 0),
        )  # fmt: skip
        assert [tree.response_ids[0] for tree in found.trees[rank::2]] == [one.ids for one in drawn]
    assert PROCESS_SEED_STRIDE == 100_003
    shared = recipe.settings.model_copy(update={"process_seeds": "shared"})
    one, two = (replace(recipe.collector, settings=shared, num_processes=n).collect(prompts, 0) for n in (1, 2))
    assert one.trees == two.trees != found.trees


# 8, 11: heads --------------------------------------------------------------------------------------


def test_a_reward_head_is_drawn_with_its_standard_deviation(directory: Path) -> None:
    model = reward_model_of(directory, settings(adapter=None)).model
    drawn = []
    for seed in range(200):
        init_head(model, seed=seed)
        drawn.append(head_of(model).weight.detach().clone())
    assert float(torch.cat(drawn).std()) == pytest.approx(1 / math.sqrt(64 + 1), rel=0.03)
    assert head_of(model).bias is None


def test_values_can_start_at_0_and_then_learn(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(value_init="zero")
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    assert (of_one_iteration(recipe).value_N == 0).all()
    world.loop(recipe, chosen).run()
    assert float(recipe.critic.value_head_1D.detach().abs().max()) > 0
    from_model = of_one_iteration(ppo_recipe(directory, reward_directory, ppo_settings(), world=world))
    assert float(from_model.value_N.abs().min()) > 0


# 13: dropout ---------------------------------------------------------------------------------------


def test_no_model_is_in_training_mode(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(iterations=1)
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    world.loop(recipe, chosen).run()
    for model in (recipe.policy.model, recipe.critic.value.model, recipe.critic.reward_model):
        assert not any(module.training for module in model.modules())


# 14: truncation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_rest", [False, True])
def test_a_response_ends_at_its_token_for_the_reward_model(
    keep_rest: bool, directory: Path, reward_directory: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses_are(monkeypatch, byte_ids("a.b.c.d"), byte_ids("a.bcdef"))
    chosen = ppo_settings(
        batch_size=2, minibatches=1, truncation={"token": ".", "after": 2, "keep_rest": keep_rest},
        missing_eos="replace", kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False, value_init="zero",
    )  # fmt: skip
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    rollouts = of_one_iteration(recipe)
    assert rollouts.lengths_R == ([7, 7] if keep_rest else [4, 7])
    assert rollouts.is_finished_R.tolist() == [True, False]
    scored = recipe.critic.scores(pack([rollout_tree(0, list(rollouts.trees[0].prompt_ids), byte_ids("a.b."))]))
    assert float(rollouts.score_R[0]) == pytest.approx(float(scored[0]), abs=1e-5)
    # With gamma = lambda = 1, values 0 and no KL every advantage is its response's score; -1 without the token.
    assert recipe._advantages[0].tolist() == pytest.approx([float(scored[0])] * rollouts.lengths_R[0], abs=1e-5)
    assert recipe._advantages[1].tolist() == [-1.0] * 7


def test_a_truncation_token_is_one_token() -> None:
    assert token_id(".", chat()) == DOT == token_id(DOT, chat())
    with pytest.raises(ConfigError, match=r"token = 'ab': the tokenizer makes 2 tokens of it"):
        token_id("ab", chat())
    with pytest.raises(ConfigError, match="has ids 0 to 258"):
        token_id(259, chat())
    with pytest.raises(ValidationError, match=r"truncation\.after = 8 is past max_new_tokens"):
        ppo_settings(max_new_tokens=8, truncation={"after": 8})
    with pytest.raises(ValidationError, match="min_new_tokens = 9 is more than"):
        ppo_settings(max_new_tokens=8, min_new_tokens=9)


# 15, 16, 20, 21: what the published numbers are -----------------------------------------------------


def test_defaults_that_the_details_name() -> None:
    chosen = ppo_settings()
    assert (chosen.gamma, chosen.gae_lambda, chosen.clip_range, chosen.value_clip_range) == (1.0, 0.95, 0.2, 0.2)
    assert (chosen.value_coef, chosen.missing_eos_value, chosen.whiten_variance) == (0.1, -1.0, "biased")
    assert (chosen.kl_target_nats, chosen.kl_horizon_responses, chosen.kl_controller) == (6.0, 10_000, "adaptive")


# 17: KL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_every_estimator_is_what_the_reward_loses(
    estimator: str, directory: Path, reward_directory: Path, world: World
) -> None:
    chosen = ppo_settings(
        kl_estimator=estimator, kl_coef=0.3, missing_eos="keep", gae_lambda=1.0, whiten_advantages=False,
        value_init="zero", kl_target_nats=None, optimizer=OptimizerSettings(learning_rate=5e-3), adapter=None,
    )  # fmt: skip
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    series = world.loop(recipe, chosen).run()
    rollouts = recipe.rollouts
    assert rollouts is not None
    name = "ref_kl_nats" if estimator == "k1" else f"ref_kl_{estimator}_nats"
    assert abs(series[-1][name]) > 1e-3, "the second iteration should be away from the reference"
    # The first token's advantage is the whole shaped reward; value 0 is only the start's, so sum it up from rewards.
    recipe._estimate_advantages(rollouts, list(range(6)))
    values_N = [float(row[0]) for row in rollouts.rows(rollouts.value_N)]
    totals = [float(recipe._advantages[index][0]) + values_N[index] for index in range(6)]
    assert sum(totals) / 6 == pytest.approx(series[-1]["score"] - 0.3 * series[-1][name], abs=1e-4)
    assert series[-1]["rlhf_reward"] == pytest.approx(sum(totals) / 6, abs=1e-4)


def test_the_full_kl_is_over_all_words(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = ppo_settings(temperature=0.7, iterations=2, optimizer=OptimizerSettings(learning_rate=2e-2))
    recipe = ppo_recipe(directory, reward_directory, chosen, world=world)
    world.loop(recipe, chosen).run()
    found = recipe.collector.collect(recipe.plan.full_batch(0), 7)
    assert found.full_kl_N is not None
    for index, tree in enumerate(found.trees):
        whole = torch.tensor([[*tree.prompt_ids, *tree.response_ids[0]]])
        first = len(tree.prompt_ids)
        with torch.no_grad():
            own = torch.log_softmax(recipe.policy.model(whole).logits[0, first - 1 : -1] / 0.7, -1)
            with recipe.reference.active() as reference:
                ref = torch.log_softmax(reference(whole).logits[0, first - 1 : -1] / 0.7, -1)
        torch.testing.assert_close(found.rows(found.full_kl_N)[index], full_kl(own, ref), rtol=1e-3, atol=1e-5)


# 18: whitening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["biased", "unbiased"])
def test_advantages_of_a_minibatch_are_whitened_either_way(
    variance: str, directory: Path, reward_directory: Path, world: World
) -> None:
    recipe = ppo_recipe(directory, reward_directory, ppo_settings(whiten_variance=variance), world=world)
    batches = recipe.micro_batches(0)
    members = [int(tree.record_id) for batch in batches if not is_valued(batch) for tree in batch.trees]
    advantages = torch.cat([recipe._advantages[index] for index in members])
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages.var(unbiased=variance == "unbiased")) == pytest.approx(1.0, abs=1e-4)
