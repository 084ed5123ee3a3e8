"""Two gloo processes that divide every weight train as one process that holds them all, and go on from its checkpoints.

The processes are started once and train every case; each test looks at one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline_lib.errors import InterruptedRunError
from pipeline_lib.models.base import load_causal_model
from pipeline_lib.models.tiny import byte_tokenizer
from pipeline_lib.stages.run_config import RunConfig
from pipeline_lib.text.encode import Tree
from pipeline_lib.training.loop import TrainingLoop
from pipeline_lib.training.plan import DataPlan
from pipeline_lib.training.pretraining import TEXT, PretrainingRows
from pipeline_lib.training.recipe import Recipe
from pipeline_lib.training.recipes.sft import KlPenalty, SftRecipe
from pipeline_lib.training.reference import Reference
from pipeline_lib.training.settings import EarlyStoppingSettings, OfflineSettings
from pipeline_lib.training.sharding import ShardedWeights
from pipeline_lib.training.trained_model import prepare
from tests.toy import (
    DEMONSTRATIONS,
    LORA,
    PAIR_ROWS,
    FolderCheckpoints,
    World,
    dpo_recipe,
    furthest,
    layout,
    policy_of,
    preference_recipe,
    reward_recipe,
    settings,
    sft_recipe,
    stop_before,
    weights_of,
)
from tests.unit.training.two_processes import SIZE, run_together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEADY = {"epsilon": 1e-5, "schedule": "cosine", "warmup_frac": 0.3}


def chosen(*, epochs: int = 1, **changes: Any) -> OfflineSettings:
    return settings(batch_size=4, epochs=epochs, optimizer=STEADY, **changes)


def sft_with_everything(directory: Path, choice: OfflineSettings, **how: Any) -> SftRecipe:
    """SFT with a KL to its reference, which is the same model with its adapters off, and with pretraining text."""
    policy = policy_of(directory, choice)
    rows = tuple(Tree(f"{TEXT}{n}", (2,), (tuple(range(10 + n, 20 + 2 * n)),), (False,)) for n in range(5))
    return SftRecipe(
        policy, DataPlan.of(DEMONSTRATIONS, choice), layout(**how), kl=KlPenalty(0.5, Reference.of(policy)),
        pretraining=PretrainingRows(rows, coef=0.25, rows_per_step=3, seed=1),
    )  # fmt: skip


def kto(directory: Path, choice: OfflineSettings, **how: Any) -> Recipe:
    """KTO, which runs the model on mismatched rows before each step."""
    return preference_recipe(directory, choice, {"name": "kto"}, PAIR_ROWS, **how)


def sft_on_bf16(directory: Path, choice: OfflineSettings, **how: Any) -> SftRecipe:
    """SFT of fp32 adapters on a frozen bf16 base."""
    policy = prepare(load_causal_model(directory, dtype=torch.bfloat16), directory, choice, seed=3)
    return SftRecipe(policy, DataPlan.of(DEMONSTRATIONS, choice), layout(**how))


def sft_of_gpt2(directory: Path, choice: OfflineSettings, **how: Any) -> SftRecipe:
    """SFT of another architecture, its head not tied to its embeddings."""
    return SftRecipe(policy_of(gpt2_beside(directory), choice), DataPlan.of(DEMONSTRATIONS, choice), layout(**how))


def gpt2_beside(directory: Path) -> Path:
    return directory.with_name("tiny-gpt2")


def write_gpt2(folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(byte_tokenizer()), n_positions=512, n_embd=64, n_layer=3, n_head=4,
                tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """A training, and how its rows fall on forwards."""

    recipe: Callable[..., Recipe]
    settings: OfflineSettings
    tokens_per_batch: int = 60
    is_packed: bool = True

    def make(self, directory: Path) -> Recipe:
        return self.recipe(directory, self.settings, tokens_per_batch=self.tokens_per_batch, is_packed=self.is_packed)


WHOLE = chosen(adapter=None)
STOPPING = EarlyStoppingSettings(held_out_frac=0.25, every_steps=2, patience=2)
CASES = {
    "sft": Case(sft_recipe, WHOLE),
    "sft-one-forward": Case(sft_recipe, WHOLE, tokens_per_batch=4096),
    "sft-padded": Case(sft_recipe, WHOLE, is_packed=False),
    "sft-averaged-stopped": Case(sft_recipe, chosen(epochs=2, adapter=None, ema_decay=0.5, early_stopping=STOPPING)),
    "sft-gpt2": Case(sft_of_gpt2, WHOLE),
    "sft-rmsprop": Case(sft_recipe, settings(adapter=None, optimizer={"name": "rmsprop", "epsilon": 1e-3})),
    "sft-lora-kl-text": Case(sft_with_everything, chosen()),
    "sft-lora-bf16": Case(sft_on_bf16, chosen()),
    "sft-dora": Case(sft_recipe, chosen(adapter=LORA.model_copy(update={"use_dora": True}))),
    "dpo-lora-recomputed": Case(dpo_recipe, chosen(gradient_checkpointing=True)),
    "dpo": Case(dpo_recipe, WHOLE),
    "kto-lora": Case(kto, chosen()),
    "reward-lora": Case(reward_recipe, chosen()),
    "reward": Case(reward_recipe, WHOLE),
}
RESUMED = CASES["sft-averaged-stopped"]
"""The case that is stopped and goes on: weights, moments, averages and best weights are in its checkpoints."""


def train_all(rank: int, directory: Path, workdir: Path) -> None:
    """One process of the group: train every case, and leave the weights in files."""
    for name, case in CASES.items():
        recipe = case.make(directory)
        loop = World.at(workdir / name / str(rank)).loop(recipe, case.settings, is_sharded=True)
        held = held_of(loop)
        series = loop.run()
        save(workdir / f"{name}-{rank}", recipe, {"series": series, "held": held})
    resume_everywhere(rank, directory, workdir)


def resume_everywhere(rank: int, directory: Path, workdir: Path) -> None:
    """Stop and go on, divided; and go on from what one process left behind."""
    world = World(workdir / "parts" / f"work-{rank}", FolderCheckpoints(workdir / "parts" / "kept"))
    for stop in (1, 2, None):
        recipe = RESUMED.make(directory)
        loop = world.loop(recipe, RESUMED.settings, is_sharded=True)
        world.should_stop = (lambda: False) if stop is None else stop_before(stop, loop)
        if stop is None:
            save(workdir / f"in-parts-{rank}", recipe, {"series": loop.run()})
        else:
            with pytest.raises(InterruptedRunError, match=f"before step {stop} of"):
                loop.run()
    world = World(workdir / "alone" / f"work-{rank}", FolderCheckpoints(workdir / "alone" / "kept", [2]))
    recipe = RESUMED.make(directory)
    series = world.loop(recipe, RESUMED.settings, is_sharded=True).run()
    save(workdir / f"after-alone-{rank}", recipe, {"series": series})


def held_of(loop: TrainingLoop) -> list[float]:
    """What this process holds of the model, and of what is trained, as shares of the whole."""
    assert isinstance(loop.weights, ShardedWeights)
    weights = [cast(DTensor, weight) for weight in loop.weights.root.parameters()]
    trained = [weight for weight in weights if weight.requires_grad]
    parts = [part for group in loop.groups for part in group.parameters.values()]
    return [
        sum(weight.to_local().numel() for weight in weights) / sum(weight.numel() for weight in weights),
        sum(part.numel() for part in parts) / sum(weight.numel() for weight in trained),
    ]


def save(place: Path, recipe: Recipe, figures: dict[str, Any]) -> None:
    save_file(weights_of(recipe), place.with_suffix(".safetensors"))
    place.with_suffix(".json").write_text(json.dumps(figures))


@pytest.fixture(scope="module")
def trained(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left what they trained."""
    workdir = tmp_path_factory.mktemp("sharded")
    write_gpt2(gpt2_beside(directory))
    world = World.at(workdir / "alone")
    loop = world.loop(RESUMED.make(directory), RESUMED.settings)
    world.should_stop = stop_before(2, loop)
    with pytest.raises(InterruptedRunError):
        loop.run()
    run_together(train_all, directory, workdir)
    return workdir


def found(trained: Path, name: str, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    place = trained / f"{name}-{rank}"
    return load_file(place.with_suffix(".safetensors")), json.loads(place.with_suffix(".json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_divided_weights_train_as_whole_ones(name: str, directory: Path, trained: Path, tmp_path: Path) -> None:
    case = CASES[name]
    alone = case.make(directory)
    before = weights_of(alone)
    series = World.at(tmp_path).loop(alone, case.settings).run()
    (first, figures), (second, others) = (found(trained, name, rank) for rank in range(SIZE))
    assert furthest(first, second) == 0.0
    assert furthest(first, weights_of(alone)) <= 1e-5
    assert furthest(first, before) > 1e-4, "something was trained"
    assert figures["series"] == others["series"]
    for row, expected in zip(figures["series"], series, strict=True):
        assert row == pytest.approx(expected, abs=2e-5, rel=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_its_share_of_the_weights(name: str, trained: Path) -> None:
    shares = [found(trained, name, rank)[1]["held"] for rank in range(SIZE)]
    for which in (0, 1):
        assert sum(share[which] for share in shares) == pytest.approx(1.0)
        assert max(share[which] for share in shares) <= 1 / SIZE + 0.02


def test_divided_weights_go_on_bit_for_bit(trained: Path) -> None:
    for rank in range(SIZE):
        weights, figures = found(trained, "sft-averaged-stopped", rank)
        again, figures_again = found(trained, "in-parts", rank)
        assert furthest(weights, again) == 0.0
        assert figures_again["series"] == figures["series"]


def test_one_process_goes_on_from_what_two_left_and_two_from_what_one_left(
    directory: Path, trained: Path, tmp_path: Path
) -> None:
    uninterrupted = found(trained, "sft-averaged-stopped", 0)[0]
    recipe = RESUMED.make(directory)
    World(tmp_path, FolderCheckpoints(trained / "parts" / "kept", [2])).loop(recipe, RESUMED.settings).run()
    assert furthest(weights_of(recipe), uninterrupted) <= 1e-5
    assert furthest(found(trained, "after-alone", 0)[0], uninterrupted) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "ppo.method = 'ppo' samples from the model"),
        ({"ppo": None, "runtime": {"sharding": "full"}}, "set runtime.processes to 2 or more"),
        ({"ppo": None, "dpo": {"adapter": {"name": "prompt"}}}, "dpo.adapter.name = 'prompt'"),
        ({"ppo": None, "sft": {"adapter": {"name": "qlora"}}}, "sft.adapter.name = 'qlora'"),
        ({"ppo": None, "reward": {"optimizer": {"name": "adafactor"}}}, "reward.optimizer.name = 'adafactor'"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    config = {"runtime": {"processes": 2, "sharding": "full"}, **changes}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(config)
