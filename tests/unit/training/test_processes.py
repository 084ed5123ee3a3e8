"""Two gloo processes train the same weights as one, in whatever way the rows fall on them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline_lib.training.recipe import Recipe
from tests.toy import RECIPES, World, furthest, settings, weights_of

SETTINGS = settings(batch_size=8, epochs=3, optimizer={"epsilon": 1e-5})


def recipe_of(kind: str, directory: Path, tokens_per_batch: int) -> Recipe:
    return RECIPES[kind](directory, SETTINGS, tokens_per_batch=tokens_per_batch, is_packed=True)


def train(rank: int, size: int, port: int, kind: str, directory: Path, workdir: Path, tokens_per_batch: int) -> None:
    """One process of a group: train, and leave the weights in a file."""
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    torch.set_num_threads(1)
    recipe = recipe_of(kind, directory, tokens_per_batch)
    series = World.at(workdir / str(rank)).loop(recipe, SETTINGS).run()
    save_file(weights_of(recipe), workdir / f"{rank}.safetensors")
    (workdir / f"{rank}.json").write_text(json.dumps(series))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# With 4096 tokens a forward the step is one forward, and the second process has none.
@pytest.mark.parametrize(("kind", "tokens_per_batch"), [*((kind, 60) for kind in RECIPES), ("sft", 4096)])
def test_two_processes_train_as_one(kind: str, tokens_per_batch: int, directory: Path, tmp_path: Path) -> None:
    alone = recipe_of(kind, directory, 4096)
    series = World.at(tmp_path / "alone").loop(alone, SETTINGS).run()
    context = multiprocessing.get_context("spawn")
    port = free_port()
    group = [
        context.Process(target=train, args=(rank, 2, port, kind, directory, tmp_path, tokens_per_batch))
        for rank in range(2)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    weights = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert furthest(weights[0], weights[1]) == 0.0
    assert furthest(weights[0], weights_of(alone)) <= 1e-5
    assert [row["loss"] for row in both[0]] == pytest.approx([row["loss"] for row in series], abs=1e-5)
    assert both[0] == both[1]
