"""Pointers that move by compare-and-swap: of several racers exactly one wins."""

from __future__ import annotations

import json
from typing import Any

from pipeline_lib.errors import ConflictError
from pipeline_lib.hashing import canonical_json
from pipeline_lib.storage.objects import damaged
from pipeline_lib.storage.store import ArtifactStore


class Pointer:
    """A small JSON value with a name, changed only by whoever read its latest state."""

    def __init__(self, store: ArtifactStore, name: str) -> None:
        """Name the pointer; nothing is read yet."""
        self.store, self.name = store, name
        self._path = f"pointers/{name}.json"

    def read(self) -> tuple[dict[str, Any], str] | None:
        """Return the value and the ETag to swap it by, or None where it was never set.

        Raises:
            IntegrityError: What is there is no JSON object.
        """
        found = self.store.objects.get(self._path)
        if found is None:
            return None
        try:
            value = json.loads(found.content)
        except ValueError as error:
            raise damaged(f"the pointer {self.name!r}", is_missing=False) from error
        if not isinstance(value, dict):
            raise damaged(f"the pointer {self.name!r}", is_missing=False)
        return value, found.etag

    def swap(self, expected_etag: str | None, value: dict[str, Any]) -> str:
        """Set the value where nobody changed it since it was read.

        Args:
            expected_etag: The ETag that `read` gave; None where there was nothing.
            value: The new value.

        Returns:
            The new ETag.

        Raises:
            ConflictError: Another process changed it first.
        """
        content = canonical_json(value)
        try:
            if expected_etag is None:
                return self.store.objects.put(self._path, content, if_none_match=True)
            return self.store.objects.put(self._path, content, if_match=expected_etag)
        except ConflictError:
            raise ConflictError(
                f"the pointer {self.name!r} was changed by another process",
                next_step="run the same command again: it reads the new value first",
            ) from None
