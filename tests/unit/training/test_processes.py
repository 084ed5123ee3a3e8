"""Two gloo processes train the same weights as one, in whatever way the rows fall on them.

The processes are started once and train every case; each test looks at one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline_lib.training.recipe import Recipe
from tests.toy import RECIPES, World, furthest, settings, weights_of
from tests.unit.training.two_processes import SIZE, run_together

SETTINGS = settings(batch_size=8, epochs=3, optimizer={"epsilon": 1e-5})
# With 4096 tokens a forward the step is one forward, and the second process has none.
CASES = [*((kind, 60) for kind in RECIPES), ("sft", 4096)]


def recipe_of(kind: str, directory: Path, tokens_per_batch: int) -> Recipe:
    return RECIPES[kind](directory, SETTINGS, tokens_per_batch=tokens_per_batch, is_packed=True)


def train_all(rank: int, directory: Path, workdir: Path) -> None:
    """One process of the group: train every case, and leave the weights in files."""
    for kind, tokens_per_batch in CASES:
        place = workdir / f"{kind}-{tokens_per_batch}-{rank}"
        recipe = recipe_of(kind, directory, tokens_per_batch)
        series = World.at(place).loop(recipe, SETTINGS).run()
        save_file(weights_of(recipe), place.with_suffix(".safetensors"))
        place.with_suffix(".json").write_text(json.dumps(series))


@pytest.fixture(scope="module")
def trained(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes left what they trained."""
    workdir = tmp_path_factory.mktemp("together")
    run_together(train_all, directory, workdir)
    return workdir


@pytest.mark.parametrize(("kind", "tokens_per_batch"), CASES)
def test_two_processes_train_as_one(
    kind: str, tokens_per_batch: int, directory: Path, trained: Path, tmp_path: Path
) -> None:
    alone = recipe_of(kind, directory, 4096)
    series = World.at(tmp_path / "alone").loop(alone, SETTINGS).run()
    places = [trained / f"{kind}-{tokens_per_batch}-{rank}" for rank in range(SIZE)]
    weights = [load_file(place.with_suffix(".safetensors")) for place in places]
    both = [json.loads(place.with_suffix(".json").read_text()) for place in places]
    assert furthest(weights[0], weights[1]) == 0.0
    assert furthest(weights[0], weights_of(alone)) <= 1e-5
    assert [row["loss"] for row in both[0]] == pytest.approx([row["loss"] for row in series], abs=1e-5)
    assert both[0] == both[1]
