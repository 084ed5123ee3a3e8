"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_lib.storage.embedded import EmbeddedS3
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore


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
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once: each test that needs one copies the file."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
