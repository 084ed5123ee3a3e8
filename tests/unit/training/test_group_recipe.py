"""RLOO and GRPO: they start as their reference, equal a naive computation, learn a rule, resume bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline_lib.errors import DivergedError, InterruptedRunError
from pipeline_lib.models.heads import load_scalar_model
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.critic import FrozenRewardModel, Normalization
from pipeline_lib.training.group_settings import GrpoSettings, RlooSettings
from pipeline_lib.training.recipes.group import GroupRecipe
from pipeline_lib.training.rollout import Rollouts, rollout_tree
from pipeline_lib.training.sampling_rollouts import (
    GroupScorer,
    RewardModelScorer,
    group_tree,
    prompt_trees,
)
from pipeline_lib.training.settings import OptimizerSettings
from tests.toy import (
    GROUP_METHODS,
    World,
    byte_ids,
    encoder,
    furthest,
    group_recipe,
    group_settings,
    layout,
    record,
    stop_before,
    weights_of,
)

LETTERS = frozenset(byte_ids("abcdefghijklmnopqrstuvwxyz"))
Group = RlooSettings | GrpoSettings


class ByRule:
    """A rule as a reward: a figure of each response's ids."""

    def __init__(self, rule: Callable[[tuple[int, ...]], float]) -> None:
        self.rule = rule

    def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor:
        return torch.tensor([self.rule(ids) for tree in samples for ids in tree.response_ids])


def share_of_letters(ids: tuple[int, ...]) -> float:
    return sum(token in LETTERS for token in ids) / len(ids)


def recipe_of(
    directory: Path, chosen: Group, world: World, *, scorer: GroupScorer | None = None, **how: Any
) -> GroupRecipe:
    return group_recipe(directory, chosen, scorer or ByRule(share_of_letters), world=world, **how)


def of_one_iteration(recipe: GroupRecipe) -> Rollouts:
    recipe.micro_batches(0)
    assert recipe.rollouts is not None
    return recipe.rollouts


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_the_first_step_has_ratio_one_and_no_kl(method: str, directory: Path, world: World) -> None:
    chosen = group_settings(method)
    series = world.loop(recipe_of(directory, chosen, world), chosen).run()
    assert [row["iteration"] for row in series] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert series[0]["log_ratio_abs_nats"] <= 1e-5
    assert series[0]["clip_frac"] == 0.0
    assert abs(series[0]["ref_kl_nats"]) <= 1e-5
    assert abs(series[0]["kl_loss"]) <= 1e-9
    assert abs(series[4]["ref_kl_nats"]) > 1e-6
    assert series[0]["loss"] == pytest.approx(series[0]["policy_loss"] + series[0]["kl_loss"], abs=1e-9)


def naive_logps(recipe: GroupRecipe, tree: Tree, ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of one response, alone in a forward, under the policy and its reference."""
    whole = torch.tensor([[*tree.prompt_ids, *ids]])
    first, found = len(tree.prompt_ids), []
    temperature = recipe.settings.temperature
    own = recipe.policy.model(whole).logits[0, first - 1 : -1]
    with torch.no_grad(), recipe.sampler.reference.active() as reference:
        ref = reference(whole).logits[0, first - 1 : -1]
    for logits_TV in (own, ref):
        logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
        found.append(logp_TV.gather(1, whole[0, first:, None])[:, 0])
    return found[0], found[1]


def test_rollouts_are_what_the_models_say_of_them(directory: Path, reward_directory: Path, world: World) -> None:
    chosen = group_settings("grpo", temperature=0.7)
    model = FrozenRewardModel(reward_directory, Normalization(gain=2.0, bias=0.5), settings=chosen)
    scorer = RewardModelScorer(model, layout())
    recipe = recipe_of(directory, chosen, world, scorer=scorer, tokens_per_batch=64)
    rollouts = of_one_iteration(recipe)
    assert [len(tree.response_ids) for tree in rollouts.trees] == [3, 3, 3, 3]
    plain = load_scalar_model(reward_directory, dtype=torch.float32).eval()
    response = 0
    for tree in rollouts.trees:
        for ids in tree.response_ids:
            logp_T, ref_T = naive_logps(recipe, tree, ids)
            torch.testing.assert_close(rollouts.rows(rollouts.logp_N)[response], logp_T.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(rollouts.rows(rollouts.ref_logp_N)[response], ref_T, rtol=0, atol=1e-5)
            with torch.no_grad():
                score = 2.0 * float(plain(torch.tensor([[*tree.prompt_ids, *ids]])).logits[0, 0]) + 0.5
            assert float(rollouts.score_R[response]) == pytest.approx(score, abs=1e-5)
            assert bool(rollouts.is_finished_R[response]) == (ids[-1] == 2)
            response += 1
    kept = Rollouts.from_tensors(rollouts.tensors())
    assert kept.trees == rollouts.trees
    assert all(torch.equal(value, kept.tensors()[name]) for name, value in rollouts.tensors().items())


def naive_loss(recipe: GroupRecipe, members: list[int]) -> Tensor:
    """The published formulas, one response after another, nothing packed."""
    chosen, rollouts = recipe.settings, of_one_iteration(recipe)
    old, ref = rollouts.rows(rollouts.logp_N), rollouts.rows(rollouts.ref_logp_N)
    size, eps = chosen.samples_per_prompt, chosen.clip_range
    terms, tokens = [], 0
    for index in members:
        places = range(index * size, (index + 1) * size)
        rewards = [float(rollouts.score_R[place]) for place in places]
        if isinstance(chosen, RlooSettings):
            rewards = [r - chosen.beta * float((old[p] - ref[p]).sum()) for r, p in zip(rewards, places, strict=True)]
        mean = sum(rewards) / size
        deviation = (sum((r - mean) ** 2 for r in rewards) / (size - 1)) ** 0.5
        for k, place in enumerate(places):
            ids = rollouts.trees[index].response_ids[k]
            new_T, ref_T = naive_logps(recipe, rollouts.trees[index], ids)
            tokens += len(ids)
            if isinstance(chosen, RlooSettings):
                advantage = rewards[k] - (sum(rewards) - rewards[k]) / (size - 1)
                ratio = (new_T.sum() - old[place].sum()).exp()
                terms.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps, 1 + eps)))
                continue
            advantage = (rewards[k] - mean) / (1.0 if chosen.scale == "none" else deviation + 1e-4)
            ratio_T = (new_T - old[place]).exp()
            kl_T = (ref_T - new_T).exp() - (ref_T - new_T) - 1
            loss_T = torch.maximum(-advantage * ratio_T, -advantage * ratio_T.clamp(1 - eps, 1 + eps))
            loss_T = loss_T + chosen.beta * kl_T
            terms.append(loss_T.mean() if chosen.loss_norm == "sequence" else loss_T.sum())
    count = len(members) * size
    if isinstance(chosen, RlooSettings) or chosen.loss_norm == "sequence":
        return torch.stack(terms).sum() / count
    return torch.stack(terms).sum() / (tokens if chosen.loss_norm == "token" else count * chosen.max_new_tokens)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("rloo", {"beta": 0.3}),
        ("grpo", {"beta": 0.3}),
        ("grpo", {"loss_norm": "token", "scale": "none"}),
        ("grpo", {"loss_norm": "constant", "scale": "none", "beta": 0.0}),
    ],
)
@pytest.mark.parametrize("tokens_per_batch", [4096, 24])
def test_loss_and_gradient_are_those_of_the_formula(
    method: str, changes: dict[str, Any], tokens_per_batch: int, directory: Path, world: World
) -> None:
    chosen = group_settings(method, adapter=None, clip_range=0.05, temperature=0.8, **changes)
    recipe = recipe_of(directory, chosen, world, tokens_per_batch=tokens_per_batch)
    batches = recipe.micro_batches(0)
    assert len(batches) == (1 if tokens_per_batch == 4096 else 2)
    parameters = recipe.parameter_groups()[0].parameters
    with torch.no_grad():  # some updates later: ratios on both sides of the clip, a KL
        noise = torch.Generator().manual_seed(1)
        for parameter in parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    results = [recipe.loss(batch, batches) for batch in batches]
    found = torch.stack([result.loss for result in results]).sum()
    clipped = sum(result.figures["clip_frac"].total for result in results)
    units = sum(result.figures["clip_frac"].count for result in results)
    assert 0 < clipped < units, "the case should have tokens on both sides of the clip"
    expected = naive_loss(recipe, [int(tree.record_id) for batch in batches for tree in batch.trees])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    ours = torch.autograd.grad(found, list(parameters.values()))
    theirs = torch.autograd.grad(expected, list(parameters.values()))
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_weights_do_not_depend_on_the_layout(method: str, directory: Path, tmp_path: Path) -> None:
    chosen = group_settings(method, optimizer={"epsilon": 1e-4})
    found = []
    for name, tokens, is_packed in (("one", 4096, True), ("many", 16, True), ("padded", 16, False)):
        world = World.at(tmp_path / name)
        recipe = recipe_of(directory, chosen, world, tokens_per_batch=tokens, is_packed=is_packed)
        assert len(recipe.micro_batches(0)) == (1 if tokens == 4096 else 2)
        world.loop(recipe, chosen).run()
        found.append(weights_of(recipe))
    assert furthest(found[0], found[1]) <= 1e-5
    assert furthest(found[0], found[2]) <= 1e-5


def test_minibatches_share_out_the_prompts_once_a_pass(directory: Path, world: World) -> None:
    chosen = group_settings("grpo", minibatches=2, mu=2, batch_size=5)
    recipe = recipe_of(directory, chosen, world)
    assert recipe.num_steps == 8
    for first in (0, 2):
        batches = [batch for step in range(first, first + 2) for batch in recipe.micro_batches(step)]
        assert sorted(tree.record_id for batch in batches for tree in batch.trees) == ["0", "1", "2", "3", "4"]
        assert all(len(tree.response_ids) == 3 for batch in batches for tree in batch.trees)


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_a_rule_is_learnt_unless_the_kl_weight_forbids(method: str, directory: Path, tmp_path: Path) -> None:
    score = {}
    for beta in (0.0, 3.0):
        chosen = group_settings(
            method, adapter=None, batch_size=8, samples_per_prompt=4, iterations=8, mu=2, minibatches=1, beta=beta,
            clip_range=0.4, optimizer={"learning_rate": 1e-2},
        )  # fmt: skip
        world = World.at(tmp_path / str(beta))
        recipe = recipe_of(directory, chosen, world)
        score[beta] = [row["score"] for row in world.loop(recipe, chosen).run()][:: recipe.steps_per_iteration]
    assert score[0.0][0] == score[3.0][0] < 0.3
    assert score[0.0][-1] > score[0.0][0] + 0.4
    assert score[3.0][-1] < score[0.0][-1] / 2


def test_scores_of_unfinished_responses_count_as_configured(directory: Path, world: World) -> None:
    """By hand: scores 1, 3 and 5 of one prompt, the last two unfinished, KL 0.5 a token of two."""
    rollouts = Rollouts(
        (group_tree(0, [5, 6], [[7, 8], [7, 9], [8, 8]]),), torch.zeros(6), torch.full((6,), -0.5), torch.zeros(6),
        torch.tensor([1.0, 3.0, 5.0]), torch.tensor([True, False, False]),
    )  # fmt: skip
    expected = {"keep": [1.0, 3.0, 5.0], "replace": [1.0, -2.0, -2.0], "penalty": [1.0, 1.0, 3.0]}
    for mode, rewards in expected.items():
        grpo = recipe_of(directory, group_settings("grpo", missing_eos=mode, missing_eos_value=-2.0), world)
        assert grpo.rewards(rollouts).tolist() == [rewards]
        rloo = recipe_of(directory, group_settings("rloo", missing_eos=mode, missing_eos_value=-2.0, beta=0.5), world)
        assert rloo.rewards(rollouts).tolist() == [[reward - 0.5 for reward in rewards]]
        rloo._finish_iteration(0, rollouts)
        assert rloo.iteration_figures["rlhf_reward"] == pytest.approx(sum(rewards) / 3 - 0.5, rel=1e-6)


def test_what_cannot_be_learnt_from_stops_with_its_reason(directory: Path, world: World) -> None:
    chosen = group_settings("grpo")

    def run(rule: Callable[[tuple[int, ...]], float], **changes: Any) -> None:
        settings_ = chosen.model_copy(update=changes)
        world.loop(recipe_of(directory, settings_, world, scorer=ByRule(rule)), settings_).run()

    with pytest.raises(DivergedError, match="all samples of a prompt have the same reward"):
        run(lambda ids: 1.0)
    with pytest.raises(DivergedError, match=r"12 of 12 scores are not finite; rows of their prompts: \w+") as caught:
        run(lambda ids: float("nan"))
    assert len(caught.value.row_ids) == 4
    with pytest.raises(DivergedError, match=r"KL explosion in iteration 2: .* limit is 0\.0"):
        run(share_of_letters, max_kl_nats=1e-9, optimizer=OptimizerSettings(learning_rate=1e-2, warmup_frac=0.0))


def test_a_reward_of_the_wrong_count_is_refused(directory: Path, world: World) -> None:
    class OneTooFew(ByRule):
        def score(self, prompts: Sequence[Tree], samples: Sequence[Tree], is_finished: Sequence[bool]) -> Tensor:
            return super().score(prompts, samples, is_finished)[1:]

    recipe = recipe_of(directory, group_settings("rloo"), world, scorer=OneTooFew(share_of_letters))
    with pytest.raises(DivergedError, match=r"\(11,\) scores for 4 x 3 responses"):
        recipe.micro_batches(0)


def test_a_policy_that_is_not_the_one_that_sampled_is_noticed(directory: Path, world: World) -> None:
    chosen = group_settings("grpo", adapter=None)
    recipe = recipe_of(directory, chosen, world)
    batches = recipe.micro_batches(0)
    with torch.no_grad():
        for parameter in recipe.parameter_groups()[0].parameters.values():
            parameter.mul_(1.1)
    figures = {name: figure.mean for name, figure in recipe.loss(batches[0], batches).figures.items()}
    with pytest.raises(DivergedError, match="the policy differs from itself"):
        recipe.check_start(0, figures)
    of_one_iteration(recipe).ref_logp_N.add_(0.1)
    with pytest.raises(DivergedError, match="policy and reference differ"):
        recipe.check_start(0, {"log_ratio_abs_nats": 0.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatches": 5}, "minibatches = 5 is more than batch_size = 4"),
        ({"samples_per_prompt": 1}, "samples_per_prompt"),
        ({"adapter": {"name": "lora", "dropout": 0.1}}, "adapter.dropout must be 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    for method in GROUP_METHODS:
        with pytest.raises(ValidationError, match=message):
            group_settings(method, **changes)


def trained(
    directory: Path, chosen: Group, world: World, stops: list[int], **how: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]], GroupRecipe]:
    for stop in [*stops, None]:
        world.should_stop = lambda: False
        recipe = recipe_of(directory, chosen, world, **how)
        loop = world.loop(recipe, chosen)
        if stop is None:
            series = loop.run()
            return weights_of(recipe), series, recipe
        world.should_stop = stop_before(stop, loop)
        with pytest.raises(InterruptedRunError, match=f"before step {stop} of"):
            loop.run()
    raise AssertionError


def assert_same(one: Any, other: Any) -> None:
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]
    states = one[2].state(), other[2].state()
    assert states[0].values == states[1].values
    assert all(torch.equal(states[0].tensors[name], states[1].tensors[name]) for name in states[0].tensors)


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(method: str, directory: Path, tmp_path: Path) -> None:
    chosen = group_settings(method)
    whole = trained(directory, chosen, World.at(tmp_path / "whole"), [])
    for stops in ([0], [1], [4], [7], [1, 3, 6]):
        name = "-".join(map(str, stops))
        assert_same(trained(directory, chosen, World.at(tmp_path / name), stops), whole)


@pytest.mark.parametrize("question", [1, 2, 3, 4, 5])
def test_a_stop_inside_the_sampling_step_leaves_no_trace(question: int, directory: Path, tmp_path: Path) -> None:
    chosen = group_settings("rloo", minibatches=1, mu=1)
    whole = trained(directory, chosen, World.at(tmp_path / "whole"), [], tokens_per_batch=40)
    world = World.at(tmp_path / "stopped")
    asked = iter(range(10**6))
    world.should_stop = lambda: next(asked) >= question
    with pytest.raises(InterruptedRunError, match="before step 0 of 2"):
        world.loop(recipe_of(directory, chosen, world, tokens_per_batch=40), chosen).run()
    assert_same(trained(directory, chosen, world, [], tokens_per_batch=40), whole)


def test_prompts_come_once_in_the_order_of_the_rows() -> None:
    rows = [record("a", "x"), record("b", "y", "z"), record("a", "other"), record("c", "x")]
    trees = prompt_trees(encoder(), rows)
    assert [tree.record_id for tree in trees] == [rows[0].id, rows[1].id, rows[3].id]
    assert all(tree.response_ids == () and not any(tree.prompt_counts) for tree in trees)


def test_kept_samples_tell_prompt_response_and_score(directory: Path, world: World) -> None:
    chosen = group_settings("grpo")
    recipe = recipe_of(directory, chosen, world)
    world.loop(recipe, chosen).run()
    rows = [json.loads(row) for row in recipe.samples]
    assert [row["iteration"] for row in rows] == [0] * 10 + [1] * 10, "ten responses of each iteration"
    assert all({"prompt", "response", "score"} <= row.keys() for row in rows)
    # Of four prompts with three samples each: a response of every prompt, then a second one, then two third ones.
    rollouts = recipe.rollouts
    assert rollouts is not None
    responses = [tree.response_ids[place] for place in range(3) for tree in rollouts.trees][:10]
    assert [row["response"] for row in rows[10:]] == [recipe.chat.decode(list(ids)) for ids in responses]
    scores = rollouts.score_R.tolist()
    assert [row["score"] for row in rows[10:]] == [scores[place] for place in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5)]


def test_figures_of_an_iteration_by_hand(directory: Path, world: World) -> None:
    """Two prompts of two samples: log-ratios 0.5, 0 | -0.5, -1 | 0, 0 | 1, 0 nats a token."""
    recipe = recipe_of(directory, group_settings("grpo", samples_per_prompt=2, beta=0.1), world)
    trees = (rollout_tree(0, [5], [7, 8], [7, 9]), rollout_tree(1, [6], [7, 8], [4, 4]))
    rollouts = Rollouts(
        trees, torch.tensor([-1.0, -1.0, -1.0, -2.0, -1.0, -1.0, -1.0, -1.0]),
        torch.tensor([-1.5, -1.0, -0.5, -1.0, -1.0, -1.0, -2.0, -1.0]), torch.full((8,), 2.5),
        torch.tensor([2.0, 4.0, 1.0, 1.0]), torch.tensor([True, False, True, True]), full_kl_N=torch.full((8,), 0.25),
        heldout_score_R=torch.tensor([1.0, 0.0, 0.0, 3.0]), parts_R={"length": torch.tensor([1.0, 3.0, 1.0, 3.0])},
    )  # fmt: skip
    recipe._finish_iteration(4, rollouts)
    expected = {
        "iteration": 4.0, "ref_kl_nats": 0.0, "ref_kl_k2_nats": (0.125 + 0.625 + 0.5) / 4, "ref_kl_full_nats": 0.5,
        "negative_kl_frac": 0.25, "score": 2.0, "shaped_score": 2.0, "non_score_reward": 0.0, "rlhf_reward": 2.0,
        "entropy_nats": 2.5, "response_tokens": 2.0, "finished_frac": 0.75, "duplicates_frac": 0.25,
        "heldout_score": 1.0, "reward/length": 2.0, "alike_frac": 0.5, "best_in_group": 2.5, "group_std": 2**0.5 / 2,
    }  # fmt: skip
    figures = recipe.iteration_figures
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert "breaches" not in figures, "there is no circuit breaker"


def test_a_held_out_reward_model_scores_and_stays_out(directory: Path, reward_directory: Path, tmp_path: Path) -> None:
    """The weights are those of a training without it, and its own do not move."""
    chosen = group_settings("rloo")
    trained = []
    heldout = FrozenRewardModel(reward_directory, Normalization(gain=2.0, bias=0.5), settings=chosen)
    before = {name: value.clone() for name, value in heldout.model.state_dict().items()}
    for measuring in (None, heldout):
        world = World.at(tmp_path / str(measuring is None))
        recipe = recipe_of(directory, chosen, world, heldout=measuring)
        series = world.loop(recipe, chosen).run()
        assert [group.name for group in recipe.parameter_groups()] == ["policy"]
        trained.append((weights_of(recipe), series, recipe.rollouts))
    (alone, _, without), (watched, series, rollouts) = trained
    assert all(torch.equal(alone[name], watched[name]) for name in alone)
    assert without is not None
    assert without.heldout_score_R is None
    assert rollouts is not None
    assert rollouts.heldout_score_R is not None
    again = Rollouts.from_tensors(rollouts.tensors())
    assert torch.equal(again.heldout_score_R, rollouts.heldout_score_R)  # type: ignore[arg-type]
    assert series[-1]["heldout_score"] == float(rollouts.heldout_score_R.mean())
    after = heldout.model.state_dict()
    assert all(torch.equal(after[name], value) and not value.requires_grad for name, value in before.items())
    response = 0
    for tree in rollouts.trees:
        for ids in tree.response_ids:
            with torch.no_grad():
                score = 2.0 * float(heldout.model(torch.tensor([[*tree.prompt_ids, *ids]])).logits[0, 0]) + 0.5
            assert float(rollouts.heldout_score_R[response]) == pytest.approx(score, abs=1e-5)
            response += 1
