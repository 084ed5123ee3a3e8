"""MLflow: runs, live metrics, the model registry. The only file that imports it.

Tracking is a view: a failure while tracking is logged once and never stops a stage. Registration
is different, a promotion without it is not finished; there failures are `TrackingError`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline_lib.errors import TrackingError
from pipeline_lib.schema import ArtifactRef
from pipeline_lib.validation import Frozen

logger = logging.getLogger(__name__)

ARTIFACT_TAG = "prefline.artifact_id"
"""Tag of a model version that names its artifact: the registry's idempotency key."""
FORM_TAG = "prefline.form"
"""`loadable`: MLflow holds the files; `reference`: the version names the artifact's place only."""
_FLUSH_EVERY_S = 1.0
_METRICS_PER_CALL = 900

LogModel = Callable[[Callable[..., Any], Callable[..., Any]], str]


class TrackingSettings(Frozen):
    """Where MLflow is."""

    uri: str
    """A server's address, or `sqlite:///...`."""
    artifact_root: str | None = None
    """Where a new experiment keeps its artifacts; None leaves it to the server."""


class Tracker:
    """One pipeline run in MLflow, with a child run a stage.

    Every method may be called from any thread. After the first failure the tracker stays silent:
    the figures are in the artifacts, from which MLflow can be filled again.
    """

    def __init__(self, settings: TrackingSettings, experiment: str) -> None:
        """Open the experiment and start nothing yet."""
        self.settings, self.experiment = settings, experiment
        self.client: MlflowClient | None = None
        self.run_id: str | None = None
        self._experiment_id = ""
        self._lock = threading.Lock()

    def start(self, name: str, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Start the parent run, with the configuration as parameters."""

        def begin() -> None:
            _be_quiet()
            mlflow.set_tracking_uri(self.settings.uri)
            client = MlflowClient(self.settings.uri)
            found = client.get_experiment_by_name(self.experiment)
            self._experiment_id = (
                found.experiment_id
                if found is not None
                else client.create_experiment(self.experiment, artifact_location=self._artifact_location())
            )
            run = client.create_run(self._experiment_id, run_name=name, tags=dict(tags))
            self.run_id = run.info.run_id
            self.client = client
            for key, value in params.items():
                client.log_param(self.run_id, key, str(value)[:500])

        self._guarded(begin)

    def stage(self, stage: str) -> StageRun:
        """Return a stage's child run; it starts with the first thing told to it."""
        return StageRun(self, stage)

    def log_file(self, path: Path) -> None:
        """Keep a file as an artifact of the parent run."""
        self._with_client(lambda client: client.log_artifact(self._parent(), str(path)))

    def finish(self, status: str, tags: Mapping[str, str]) -> None:
        """End the parent run as `FINISHED`, `FAILED` or `KILLED`."""

        def end(client: MlflowClient) -> None:
            for key, value in tags.items():
                client.set_tag(self._parent(), key, value)
            client.set_terminated(self._parent(), status)

        self._with_client(end)

    def _artifact_location(self) -> str | None:
        root = self.settings.artifact_root
        return None if root is None else f"{root.rstrip('/')}/{self.experiment}"

    def _parent(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _with_client(self, action: Callable[[MlflowClient], object]) -> None:
        client = self.client
        if client is not None:
            self._guarded(lambda: action(client))

    def _guarded(self, action: Callable[[], object]) -> None:
        with self._lock:
            try:
                action()
            except Exception as error:
                logger.warning("MLflow is left out from here on: %s", str(error).splitlines()[0])
                self.client = None


class StageRun:
    """A stage's run under the pipeline's."""

    def __init__(self, tracker: Tracker, stage: str) -> None:
        self._tracker, self._stage = tracker, stage
        self.run_id: str | None = None
        self._pending: list[Metric] = []
        self._last_flush_s = time.monotonic()

    def start(self, *, params: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]) -> None:
        """Start the run; inputs become dataset inputs with their digests."""

        def begin(client: MlflowClient) -> None:
            tags = {"mlflow.parentRunId": self._tracker._parent(), "prefline.stage": self._stage}
            run = client.create_run(self._tracker._experiment_id, run_name=self._stage, tags=tags)
            self.run_id = run.info.run_id
            for key, value in params.items():
                client.log_param(self.run_id, key, str(value)[:500])
            client.log_inputs(self.run_id, datasets=[_dataset(name, ref) for name, ref in inputs.items()])

        self._tracker._with_client(begin)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a step; sent about once a second."""
        now_ms = int(time.time() * 1000)
        self._pending += [Metric(name, value, now_ms, step) for name, value in values.items()]
        if time.monotonic() - self._last_flush_s >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        pending, self._pending = self._pending, []
        self._last_flush_s = time.monotonic()
        run_id = self.run_id
        if run_id is None:
            return
        for start in range(0, len(pending), _METRICS_PER_CALL):
            part = pending[start : start + _METRICS_PER_CALL]
            self._tracker._with_client(partial(_log_batch, run_id, part))

    def finish(self, status: str, *, metrics: Mapping[str, float | None], tags: Mapping[str, str]) -> None:
        """End the run with its final figures."""
        final = {f"{self._stage}/final/{name}": value for name, value in metrics.items() if value is not None}
        self.metrics(0, final)
        self.flush()
        run_id = self.run_id
        if run_id is None:
            return

        def end(client: MlflowClient) -> None:
            for key, value in tags.items():
                client.set_tag(run_id, key, value)
            client.set_terminated(run_id, status)

        self._tracker._with_client(end)


def _be_quiet() -> None:
    """Keep MLflow's notices and progress bars off the terminal; errors are raised, not printed."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _log_batch(run_id: str, metrics: list[Metric], client: MlflowClient) -> None:
    client.log_batch(run_id, metrics=metrics)


def _dataset(name: str, ref: ArtifactRef) -> DatasetInput:
    entity = Dataset(
        name=name, digest=ref.id[:32], source_type="prefline",
        source=json.dumps({"artifact": ref.id, "kind": ref.kind}),
    )  # fmt: skip
    return DatasetInput(entity, tags=[InputTag("mlflow.data.context", "input")])


class ModelRegistry:
    """Registered models of an MLflow server, keyed by artifact.

    MLflow has neither unique versions nor compare-and-swap: callers hold a lease of the artifact
    store around `register`, and the champion pointer in the store decides what the alias follows.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        """Take the server's address."""
        self.settings = settings
        _be_quiet()
        mlflow.set_tracking_uri(settings.uri)
        self._client = MlflowClient(settings.uri)

    def find(self, name: str, artifact_id: str, *, loadable: bool) -> str | None:
        """Return the first version registered for an artifact, of the loadable ones or of any."""
        query = f"name='{name}' and tags.`{ARTIFACT_TAG}`='{artifact_id}'"
        if loadable:
            query += f" and tags.`{FORM_TAG}`='loadable'"
        versions = self._call(lambda: self._client.search_model_versions(query))
        return min((str(version.version) for version in versions), key=int, default=None)

    def register_loadable(
        self, name: str, artifact_id: str, log: LogModel, *, run_id: str | None, tags: Mapping[str, str]
    ) -> str:
        """Register a model that `mlflow.transformers.load_model` loads.

        Args:
            name: The registered model's name.
            artifact_id: The model artifact.
            log: Called inside a run with MLflow's functions to log and to load; logs the model,
                checks what is loaded back, and returns the logged model's URI.
            run_id: The MLflow run it belongs to.
            tags: Tags of the version.

        Returns:
            The version.

        Raises:
            TrackingError: MLflow failed.
        """

        def log_in_run() -> str:
            with mlflow.start_run(run_id=run_id):
                return log(mlflow.transformers.log_model, mlflow.transformers.load_model)

        uri = self._call(log_in_run)
        return self._create_version(name, artifact_id, uri, {**tags, FORM_TAG: "loadable"})

    def register_reference(
        self, name: str, artifact_id: str, *, uri: str, run_id: str | None, tags: Mapping[str, str]
    ) -> str:
        """Register a model that stays in the artifact store: a version with tags and its place."""
        experiment_id = self._call(lambda: self._client.get_run(run_id).info.experiment_id) if run_id else None
        external = self._call(
            lambda: mlflow.create_external_model(
                name=f"{name}-{artifact_id[:12]}",
                tags={"prefline.uri": uri},
                source_run_id=run_id,
                experiment_id=experiment_id,
            )
        )
        return self._create_version(name, artifact_id, f"models:/{external.model_id}", {**tags, FORM_TAG: "reference"})

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias name a version; tells nothing where it already does."""
        self._call(lambda: self._client.set_registered_model_alias(name, alias, version))

    def version_of_alias(self, name: str, alias: str) -> tuple[str, dict[str, str]] | None:
        """Return version and tags that an alias names."""
        try:
            version = self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise _failure(error) from error
        return str(version.version), dict(version.tags)

    def versions(self, name: str) -> list[tuple[str, dict[str, str]]]:
        """Return all versions with their tags."""
        found = self._call(lambda: self._client.search_model_versions(f"name='{name}'"))
        return [(str(version.version), dict(version.tags)) for version in found]

    def _create_version(self, name: str, artifact_id: str, uri: str, tags: Mapping[str, str]) -> str:
        def create() -> str:
            all_tags = {**tags, ARTIFACT_TAG: artifact_id}
            return str(mlflow.register_model(uri, name, tags=all_tags).version)

        version: str = self._call(create)
        return version

    def _call(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MlflowException as error:
            raise _failure(error) from error


def _failure(error: MlflowException) -> TrackingError:
    return TrackingError(
        f"MLflow: {str(error).splitlines()[0]}",
        next_step="check MLFLOW_TRACKING_URI and the server, then run the same command again: "
        "nothing that is finished runs again",
    )


def load_pipeline(settings: TrackingSettings, uri: str) -> Any:
    """Load a registered model as a text-generation pipeline.

    Raises:
        TrackingError: There is no such model version or alias.
    """
    mlflow.set_tracking_uri(settings.uri)
    try:
        return mlflow.transformers.load_model(uri)
    except MlflowException as error:
        raise _failure(error) from error
