"""What the offline recipes compute: figures by hand, the first loss, and that they learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipeline_lib.errors import DivergedError
from pipeline_lib.losses.preference.dpo import Dpo
from pipeline_lib.models.heads import scores
from pipeline_lib.models.scoring import response_logps, response_scores
from pipeline_lib.schema import Record
from pipeline_lib.text.pack import pack
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipes.preference import PreferenceRecipe
from pipeline_lib.training.recipes.reward import RankedPairs, RewardRecipe, num_pairs
from pipeline_lib.training.recipes.sft import SftRecipe
from tests.toy import (
    DEMONSTRATIONS,
    JUDGED,
    PAIRS,
    World,
    chat,
    dialogue,
    dpo_recipe,
    encoder,
    layout,
    policy_of,
    record,
    reward_model_of,
    reward_recipe,
    settings,
    tiny_llama,
)

LN_2 = math.log(2)


def test_ranked_pairs_are_all_that_differ_and_no_ties() -> None:
    rows = [record("a", "1", "2", "3"), record("b", "1", "2"), record("c", "1", "2", "3")]
    ranks = {rows[0].id: (2, 1, 3), rows[1].id: (1, 1), rows[2].id: (2, 1, 1)}
    batch = pack([encoder().tree(row) for row in rows])
    pairs = RankedPairs.of(batch, ranks)
    assert list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True)) == [
        (0, 2), (1, 0), (1, 2), (6, 5), (7, 5),
    ]  # fmt: skip
    assert num_pairs(batch, ranks) == 5


def test_the_reward_loss_is_the_pair_mean_by_hand(directory: Path) -> None:
    chosen = settings(batch_size=8)
    recipe = reward_recipe(directory, chosen, tokens_per_batch=100)
    batches = recipe.micro_batches(0)
    assert len(batches) > 1
    loss, count = 0.0, 0
    for tree in recipe.plan.trees:
        with torch.no_grad():
            score = scores(recipe.reward_model.model, pack([tree])).tolist()
        for i, rank_i in enumerate(recipe.ranks[tree.record_id]):
            for j, rank_j in enumerate(recipe.ranks[tree.record_id]):
                if rank_i < rank_j:
                    loss += math.log1p(math.exp(score[j] - score[i])) + 0.01 * (score[i] + score[j]) ** 2
                    count += 1
    found = sum(float(recipe.loss(batch, batches).loss.detach()) for batch in batches)
    assert count == 4 * 3 + 4 * 2
    assert found == pytest.approx(loss / count, abs=1e-5)


def test_a_reward_model_learns_a_separable_preference(directory: Path, world: World) -> None:
    """The better answer is the one with an exclamation mark, in training and on rows not seen."""

    def row(n: int) -> Record:
        answer = f"answer {n * 7 % 11}"
        return record(f"q {n}", f"{answer}!", f"{answer}.")

    train, test = [row(n) for n in range(16)], [row(n) for n in range(100, 110)]
    chosen = settings(batch_size=8, epochs=10, optimizer={"learning_rate": 5e-3})
    trained = reward_model_of(directory, chosen)
    recipe = RewardRecipe(
        trained, DataPlan.of([encoder().tree(r) for r in train], chosen), layout(),
        ranks={r.id: r.ranks for r in train}, centring=0.01,
    )  # fmt: skip
    series = world.loop(recipe, chosen).run()
    assert series[-1]["loss"] < 0.3 < series[0]["loss"]
    assert series[-1]["accuracy_frac"] == 1.0
    held_out = response_scores(trained.model, [encoder().tree(r) for r in test], layout())
    assert all(better > worse for better, worse in held_out.values())


def test_a_step_of_nothing_but_ties_is_no_fault(directory: Path) -> None:
    chosen = settings(batch_size=2)
    rows = [record(f"q {n}", "a", "b", ranks=(1, 1)) for n in range(2)]
    recipe = RewardRecipe(
        reward_model_of(directory, chosen), DataPlan.of([encoder().tree(r) for r in rows], chosen), layout(),
        ranks={r.id: r.ranks for r in rows}, centring=0.01,
    )  # fmt: skip
    batches = recipe.micro_batches(0)
    assert float(recipe.loss(batches[0], batches).loss) == 0.0


@pytest.mark.parametrize("beta", [0.05, 2.0])
def test_the_first_dpo_loss_is_ln_2(beta: float, directory: Path, world: World) -> None:
    chosen = settings(batch_size=8, epochs=1)
    recipe = dpo_recipe(directory, chosen, tokens_per_batch=100)
    recipe.objective = Dpo(beta=beta)
    series = world.loop(recipe, chosen).run()
    assert series[0]["loss"] == pytest.approx(LN_2, abs=1e-4)
    assert series[0]["log_ratio_margin_nats"] == pytest.approx(0.0, abs=1e-4)
    assert series[0]["log_ratio_abs_nats_per_token"] <= 1e-5


def test_dpo_raises_the_margin(directory: Path, world: World) -> None:
    chosen = settings(batch_size=8, epochs=10)
    recipe = dpo_recipe(directory, chosen)
    series = world.loop(recipe, chosen).run()
    assert series[-1]["loss"] < 0.5 * LN_2
    assert series[-1]["accuracy_frac"] == 1.0
    after = response_logps(recipe.policy.model, PAIRS, layout())
    for name, (chosen_logp, rejected_logp) in after.items():
        ref_chosen, ref_rejected = recipe.reference[name]
        assert chosen_logp - ref_chosen > rejected_logp - ref_rejected


def test_dpo_figures_by_hand(directory: Path, world: World) -> None:
    chosen = settings(batch_size=8, epochs=2, optimizer={"learning_rate": 1e-3})
    recipe = dpo_recipe(directory, chosen)
    loop = world.loop(recipe, chosen)
    loop._step(0)
    now = response_logps(recipe.policy.model, PAIRS, layout())
    ratios = [(now[name][0] - recipe.reference[name][0], now[name][1] - recipe.reference[name][1]) for name in now]
    margins = [one - other for one, other in ratios]
    batches = recipe.micro_batches(1)
    assert len(batches) == 1
    found = recipe.loss(batches[0], batches)
    assert float(found.loss) == pytest.approx(sum(math.log1p(math.exp(-0.5 * m)) for m in margins) / 8, abs=1e-4)
    assert found.figures["log_ratio_margin_nats"].mean == pytest.approx(sum(margins) / 8, abs=1e-3)
    assert found.figures["log_ratio_chosen_nats"].mean == pytest.approx(sum(one for one, _ in ratios) / 8, abs=1e-3)
    assert found.figures["accuracy_frac"].mean == sum(margin > 0 for margin in margins) / 8


def test_a_reference_of_another_model_is_stopped_before_any_update(directory: Path, world: World) -> None:
    chosen = settings(batch_size=8)
    other = response_logps(tiny_llama(seed=99, sharpness=3.0), PAIRS, layout())
    recipe = PreferenceRecipe(
        policy_of(directory, chosen), DataPlan.of(PAIRS, chosen), layout(), objective=Dpo(), judgements=JUDGED,
        reference={name: tuple(row) for name, row in other.items()},
    )  # fmt: skip
    with pytest.raises(DivergedError, match=r"policy and reference differ by \d\.\de[+-]\d+ nats a token"):
        world.loop(recipe, chosen).run()
    assert world.told == []


def test_sft_takes_earlier_turns_into_the_mean(directory: Path) -> None:
    chosen = settings(batch_size=2)
    trees = [encoder().tree(record(dialogue("hi", "yo", "and?"), "no")), DEMONSTRATIONS[0]]
    recipe = SftRecipe(policy_of(directory, chosen), DataPlan.of(trees, chosen), layout())
    batches = recipe.micro_batches(0)
    whole = torch.tensor([[*trees[0].prompt_ids, *trees[0].response_ids[0]]])
    other = torch.tensor([[*trees[1].prompt_ids, *trees[1].response_ids[0]]])
    with torch.no_grad():
        logp_TV = torch.log_softmax(recipe.policy.model(whole).logits[0], dim=-1)
        other_TV = torch.log_softmax(recipe.policy.model(other).logits[0], dim=-1)
    # "yo" and its end stand at 21, 22, 23; "no" and its end at the end; the other's "a" and its end.
    nll = [-float(logp_TV[t - 1, whole[0, t]]) for t in (21, 22, 23, -3, -2, -1)]
    nll += [-float(other_TV[t - 1, other[0, t]]) for t in (-2, -1)]
    assert chat().tokenizer.decode(whole[0, 21:24]) == "yo<|im_end|>"
    assert float(recipe.loss(batches[0], batches).loss.detach()) == pytest.approx(sum(nll) / 8, abs=1e-5)
