"""The services that a flow talks to: the artifact store, MLflow, and where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline_lib.stages.run_config import RuntimeConfig
from pipeline_lib.storage.embedded import EmbeddedS3
from pipeline_lib.storage.s3 import S3Settings
from pipeline_lib.storage.store import ArtifactStore
from pipeline_lib.tracking import Tracker, TrackingSettings

ENDPOINT_VARIABLE = "PREFLINE_S3_ENDPOINT"
"""Address of an S3 server; `aws` for Amazon's own. Not set: the embedded server is started."""
BUCKET_VARIABLE = "PREFLINE_S3_BUCKET"
PREFIX_VARIABLE = "PREFLINE_S3_PREFIX"
TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


@dataclass(frozen=True)
class Services:
    """What the tasks of one flow run share."""

    storage: S3Settings
    store: ArtifactStore
    tracking: TrackingSettings
    tracker: Tracker
    runtime: RuntimeConfig


@contextmanager
def open_store(home: Path) -> Iterator[tuple[S3Settings, ArtifactStore]]:
    """Open the artifact store that the environment names, or the embedded one.

    Raises:
        PipelineError: The server cannot be reached or used; see the classes of storage.
    """
    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    cache = home.absolute() / "cache"
    if endpoint is not None:
        settings = S3Settings(
            endpoint_url=None if endpoint == "aws" else endpoint,
            bucket=os.environ.get(BUCKET_VARIABLE, "prefline"), prefix=os.environ.get(PREFIX_VARIABLE, ""),
        )  # fmt: skip
        store = ArtifactStore(settings, cache_directory=cache)
        store.check_conditional_writes()
        yield settings, store
        return
    embedded = EmbeddedS3(home.absolute())
    settings = embedded.start()
    os.environ.update(embedded.environment())
    try:
        store = ArtifactStore(settings, cache_directory=cache)
        store.check_conditional_writes()
        yield settings, store
    finally:
        embedded.stop()


def tracking_settings(home: Path, storage: S3Settings) -> TrackingSettings:
    """Return where MLflow is: the environment's server, or SQLite beside the embedded store."""
    uri = os.environ.get(TRACKING_VARIABLE)
    if uri is not None:
        return TrackingSettings(uri=uri)
    prefix = f"{storage.prefix}/" if storage.prefix else ""
    return TrackingSettings(
        uri=f"sqlite:///{home.absolute() / 'mlflow.db'}",
        artifact_root=f"s3://{storage.bucket}/{prefix}mlflow",
    )


@contextmanager
def open_services(runtime: RuntimeConfig, *, experiment: str) -> Iterator[Services]:
    """Open everything a flow run needs."""
    runtime.home.mkdir(parents=True, exist_ok=True)
    with open_store(runtime.home) as (storage, store):
        tracking = tracking_settings(runtime.home, storage)
        yield Services(storage, store, tracking, Tracker(tracking, experiment), runtime)
