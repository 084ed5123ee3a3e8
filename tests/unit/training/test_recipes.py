"""What the offline recipes compute: figures by hand, the first loss, and that they learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pipeline_lib.errors import DivergedError
from pipeline_lib.losses.preference.dpo import Dpo
from pipeline_lib.models.scoring import response_logps
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipes.preference import PreferenceRecipe
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
    settings,
    tiny_llama,
)

LN_2 = math.log(2)


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
