"""The places a stage may read: local files, and `s3://` through the store's own connection."""

from __future__ import annotations

from pipeline_lib.data.place import OpenPlace, RoutedPlaces
from pipeline_lib.storage.places import S3Places
from pipeline_lib.storage.store import ArtifactStore


def open_places(store: ArtifactStore) -> OpenPlace:
    """Return the opener of every place a configuration may name."""
    return RoutedPlaces({"s3": S3Places(store.client, store.settings)})
