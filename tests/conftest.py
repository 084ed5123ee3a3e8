"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from pipeline_lib.storage.embedded import EmbeddedS3
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore

if TYPE_CHECKING:
    from tests.toy import World


# A machine that is busy with something else makes no example wrong.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Settings]:
    """A real S3 server on free ports; its keys are in the environment while it runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in EmbeddedS3(tmp_path_factory.mktemp("names")).environment():
            patch.setenv(name, "")  # so that what was there before comes back afterwards
        server = EmbeddedS3(tmp_path_factory.mktemp("s3"))
        yield server.start()
        server.stop()


@pytest.fixture
def settings(s3_server: S3Settings) -> S3Settings:
    """An empty prefix of the server, and no patience: nothing here needs a second try."""
    return s3_server.model_copy(update={"prefix": f"test-{uuid.uuid4().hex}", "max_attempts": 2})


@pytest.fixture
def store(settings: S3Settings, tmp_path: Path) -> ArtifactStore:
    """An empty artifact store on a real server."""
    return ArtifactStore(settings, cache_directory=tmp_path / "cache")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer; to be read only."""
    from pipeline_lib.models.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def reward_directory(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on its backbone; to be read only."""
    from tests.toy import write_reward_model

    return write_reward_model(directory, tmp_path_factory.mktemp("tiny-reward"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty world."""
    from tests.toy import World

    return World.at(tmp_path)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once: each test that needs one copies the file."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
