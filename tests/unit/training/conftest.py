"""The tiny model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_lib.models.tiny import write_tiny_model
from tests.toy import World, write_reward_model


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def reward_directory(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on its backbone."""
    return write_reward_model(directory, tmp_path_factory.mktemp("tiny-reward"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty world."""
    return World.at(tmp_path)
