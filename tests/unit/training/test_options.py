"""Averaging, early stopping, recomputed activations, noisy embeddings, optimizers: each against a plain computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline_lib.errors import ConfigError, DataError
from pipeline_lib.models.logprobs import token_logps
from pipeline_lib.text.pack import pack, pad
from pipeline_lib.training.early_stopping import EarlyStopping
from pipeline_lib.training.ema import WeightAverage
from pipeline_lib.training.forward import noise_bound_BT, training_forward
from pipeline_lib.training.optimizer import build_optimizer
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.recipe import ParameterGroup
from pipeline_lib.training.settings import EarlyStoppingSettings, OptimizerSettings
from tests.toy import (
    DEMONSTRATIONS,
    World,
    furthest,
    settings,
    sft_recipe,
    short_tree,
    stop_before,
    tiny_llama,
    weights_of,
)


def group_of(*values: float) -> ParameterGroup:
    return ParameterGroup("g", {"w": nn.Parameter(torch.tensor(values))}, 0.1)


def test_the_average_by_hand() -> None:
    group = group_of(1.0)
    average = WeightAverage([group], 0.9)
    for value in (2.0, 3.0):
        with torch.no_grad():
            group.parameters["w"].fill_(value)
        average.update()
    # 0.9 * 1 + 0.1 * 2 = 1.1; 0.9 * 1.1 + 0.1 * 3 = 1.29
    with average.applied():
        assert group.parameters["w"].item() == pytest.approx(1.29)
    assert group.parameters["w"].item() == 3.0
    average.apply()
    assert group.parameters["w"].item() == pytest.approx(1.29)


def test_training_ends_with_the_average(directory: Path, tmp_path: Path) -> None:
    chosen = settings(batch_size=2, epochs=2, ema_decay=0.5)
    recipe = sft_recipe(directory, chosen)
    seen = [weights_of(recipe)]
    world = World.at(tmp_path)
    loop = world.loop(recipe, chosen)
    loop.hooks = type(loop.hooks)(
        lambda *_: seen.append(weights_of(recipe)), loop.hooks.on_progress, loop.hooks.should_stop
    )
    loop.run()
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: 0.5 * value + 0.5 * weights[name] for name, value in expected.items()}
    assert furthest(weights_of(recipe), expected) <= 1e-6
    assert furthest(weights_of(recipe), seen[-1]) > 1e-4


def test_early_stopping_by_hand() -> None:
    group = group_of(0.0)
    stopping = EarlyStopping([group], EarlyStoppingSettings(every_steps=2, patience=2, min_gain=0.1))
    assert [stopping.is_due(step, 6) for step in range(6)] == [False, True, False, True, False, True]
    assert stopping.is_due(4, 5), "the last step is measured"
    for step, loss in enumerate([1.0, 0.5, 0.45, float("nan")]):
        with torch.no_grad():
            group.parameters["w"].fill_(float(step))
        assert not stopping.has_ended
        stopping.record(step, loss)
    assert stopping.has_ended
    assert (stopping.best_step, stopping.best_loss) == (1, 0.5)
    stopping.restore()
    assert group.parameters["w"].item() == 1.0


def test_a_model_that_gets_worse_on_held_out_rows_is_stopped_at_its_best(directory: Path, world: World) -> None:
    stop = {"held_out_frac": 0.4, "every_steps": 1, "patience": 2}
    chosen = settings(batch_size=8, epochs=60, early_stopping=stop, adapter=None, optimizer={"learning_rate": 3e-2})
    recipe = sft_recipe(directory, chosen)
    series = world.loop(recipe, chosen).run()
    losses = [row["held_out_loss"] for row in series]
    assert len(series) < recipe.num_steps
    assert recipe.held_out_loss() == pytest.approx(min(losses), abs=1e-5)
    assert world.texts[-1].startswith(f"kept step {losses.index(min(losses)) + 1}, ")


def test_held_out_rows_are_not_trained_on_and_share_no_prompt() -> None:
    chosen = settings(early_stopping={"held_out_frac": 0.3})
    trees = [
        *DEMONSTRATIONS,
        *(short_tree(f"twin-{n}", list(tree.prompt_ids), [5]) for n, tree in enumerate(DEMONSTRATIONS)),
    ]
    plan = DataPlan.of(trees, chosen)
    assert {tree.record_id for tree in plan.trees} | {tree.record_id for tree in plan.held_out} == {
        tree.record_id for tree in trees
    }
    assert not {tree.prompt_ids for tree in plan.trees} & {tree.prompt_ids for tree in plan.held_out}
    with pytest.raises(DataError, match="1 different prompts are too few"):
        DataPlan.of(DEMONSTRATIONS[:1], chosen)


@pytest.mark.parametrize("extra", [{"ema_decay": 0.7}, {"early_stopping": {"held_out_frac": 0.3, "every_steps": 2}},
                                   {"ema_decay": 0.7, "early_stopping": {"held_out_frac": 0.3, "every_steps": 1}},
                                   {"neftune_alpha": 5.0}, {"optimizer": {"name": "adafactor"}},
                                   {"optimizer": {"name": "rmsprop"}}, {"gradient_checkpointing": True}])  # fmt: skip
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    extra: dict[str, object], directory: Path, tmp_path: Path
) -> None:
    chosen = settings(batch_size=3, epochs=3, **extra)
    whole = sft_recipe(directory, chosen)
    series = World.at(tmp_path / "whole").loop(whole, chosen).run()
    world = World.at(tmp_path / "cut")
    for step in (1, 3, 4):
        loop = world.loop(sft_recipe(directory, chosen), chosen)
        world.should_stop = stop_before(step, loop)
        with pytest.raises(Exception, match="stopped as asked"):
            loop.run()
    world.should_stop = lambda: False
    resumed = sft_recipe(directory, chosen)
    assert world.loop(resumed, chosen).run() == series
    assert furthest(weights_of(resumed), weights_of(whole)) == 0.0


def test_recomputed_activations_change_no_gradient(directory: Path, tmp_path: Path) -> None:
    found = []
    for is_on in (False, True):
        chosen = settings(batch_size=8, epochs=2, gradient_checkpointing=is_on)
        recipe = sft_recipe(directory, chosen)
        World.at(tmp_path / str(is_on)).loop(recipe, chosen).run()
        found.append(weights_of(recipe))
    assert furthest(*found) == 0.0


def test_recomputing_keeps_fewer_tensors() -> None:
    model, batch = tiny_llama(), pack(DEMONSTRATIONS)
    kept = []
    for is_on in (False, True):
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, into: list[int] = sizes) -> torch.Tensor:
            into.append(tensor.numel())
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            training_forward([model], batch, gradient_checkpointing=is_on),
        ):
            token_logps(model, batch)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    assert not any(module.training for module in model.modules())


def test_noise_is_within_the_bound_of_each_text() -> None:
    trees = [short_tree("a", [1, 2, 3], [4] * 5, [6]), short_tree("b", [1, 2, 9, 9], [7])]
    packed = pack(trees)
    bound = noise_bound_BT(packed, width=4, alpha=2.0)
    # trunk of two shared tokens: the longest text (8 tokens) counts; then tree a (8), then tree b (5)
    by_hand = [8] * 2 + [8] * 7 + [5] * 3
    assert bound[0].tolist() == pytest.approx([2.0 / (length * 4) ** 0.5 for length in by_hand])
    padded = noise_bound_BT(pad(trees, pad_id=0), width=4, alpha=2.0)
    assert padded[:, 0].tolist() == pytest.approx([2.0 / (length * 4) ** 0.5 for length in (8, 4, 5)])


def test_noise_is_on_in_training_alone(directory: Path) -> None:
    model, batch = tiny_llama(sharpness=3.0), pack(DEMONSTRATIONS)
    with torch.no_grad():
        plain = token_logps(model, batch).token_logp_N
    with training_forward([model], batch, neftune_alpha=5.0):
        torch.manual_seed(0)
        noisy = token_logps(model, batch).token_logp_N.detach()
        torch.manual_seed(0)
        again = token_logps(model, batch).token_logp_N.detach()
        with torch.no_grad():
            reference = token_logps(model, batch).token_logp_N
    assert not torch.allclose(noisy, plain, atol=1e-3)
    assert torch.equal(noisy, again)
    assert torch.equal(reference, plain)
    with torch.no_grad():
        assert torch.equal(token_logps(model, batch).token_logp_N, plain), "the noise is gone afterwards"


def test_rmsprop_is_torchs_with_smoothing_099() -> None:
    group = group_of(1.0)
    optimizer = build_optimizer([group], OptimizerSettings(name="rmsprop", epsilon=1e-8))
    group.parameters["w"].grad = torch.tensor([2.0])
    optimizer.step()
    # v = 0.01 * 4; step = 0.1 * 2 / (sqrt(0.04) + 1e-8) = 1.0
    assert group.parameters["w"].item() == pytest.approx(0.0, abs=1e-6)


def test_adafactor_keeps_rows_and_columns_only() -> None:
    group = ParameterGroup("g", {"w": nn.Parameter(torch.ones(8, 16))}, 0.1)
    optimizer = build_optimizer([group], OptimizerSettings(name="adafactor"))
    group.parameters["w"].grad = torch.ones(8, 16)
    optimizer.step()
    (state,) = optimizer.state.values()
    assert sum(value.numel() for value in state.values() if torch.is_tensor(value)) < 8 * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where CUDA is missing")
def test_eight_bits_without_cuda_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.name = 'adamw_8bit' needs a CUDA device"):
        build_optimizer([group_of(1.0)], OptimizerSettings(name="adamw_8bit"))
