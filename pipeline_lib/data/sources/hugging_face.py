"""Rows of a Hugging Face data set, by hub name or local folder. No code of the data set is ever run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline_lib.data.mapping import FieldMapping, Note, map_rows
from pipeline_lib.data.place import LocalPlaces, OpenPlace, fingerprint
from pipeline_lib.data.read import RawRow, check_values
from pipeline_lib.data.refusal import BadRowError, reject_raw
from pipeline_lib.data.source import Items, RawItems
from pipeline_lib.errors import DataError
from pipeline_lib.schema import Origin

_COMMIT = re.compile("^[0-9a-f]{40}$")
_MAX_DEPTH = 32


class HuggingFace(FieldMapping):
    """Read a data set through the package `datasets`."""

    path: str = Field(min_length=1)
    """Name on the hub, e.g. `Anthropic/hh-rlhf`, or a local folder."""
    config: str | None = None
    """Name of the data set's configuration."""
    data_dir: str | None = None
    """Folder inside the data set, e.g. `helpful-base`."""
    split: str = "train"
    """Which of the data set's splits to read; it does not decide which split a prompt gets here."""
    revision: str | None = None
    """Commit, tag or branch; the newest commit where empty."""
    streaming: bool = False
    """Read rows over the network one by one, without keeping a copy."""
    label: str = ""
    """Name of the source in reports; the data set's name where empty."""
    license: str = "unknown"
    """Licence of the rows, as an SPDX identifier where there is one."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most so many rows, good or bad."""

    def rows(self, opener: OpenPlace, note: Note) -> Items:  # noqa: ARG002 - `datasets` opens its own files
        """Yield every row of the split."""
        origin = Origin(source=self.label or self.path, license=self.license, place=self._place())
        raw_rows = islice(_checked(self._load(), origin), self.max_rows)
        yield from map_rows(raw_rows, self, origin=lambda: origin, note=note)

    def fingerprint(self, opener: OpenPlace) -> dict[str, str]:  # noqa: ARG002 - as above
        """Return the hub's commit, or the sha256 of each file of a local folder."""
        if self._is_local():
            local = LocalPlaces()
            return {file: fingerprint(local, file) for file in local.list(self.path)}
        if self.revision is not None and _COMMIT.match(self.revision):
            return {self.path: self.revision}
        return {self.path: self._resolved_commit()}

    def _is_local(self) -> bool:
        return Path(self.path).expanduser().exists()

    def _place(self) -> str:
        parts = [self.path, self.config, self.data_dir, self.split]
        return "/".join(part for part in parts if part) + (f"@{self.revision}" if self.revision else "")

    def _load(self) -> Any:
        # Imported here because it takes seconds and the table of sources is read by every command.
        import datasets  # noqa: PLC0415

        path = Path(self.path).expanduser()
        try:
            if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(path))
                return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            return datasets.load_dataset(
                str(path) if self._is_local() else self.path,
                name=self.config,
                data_dir=self.data_dir,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
            )
        except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise self._explained(error) from error

    def _resolved_commit(self) -> str:
        # Imported here for the same reason as `datasets`.
        from huggingface_hub import HfApi  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

        try:
            commit = HfApi().dataset_info(self.path, revision=self.revision, timeout=20.0).sha
        except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled) as error:
            raise self._explained(error) from error
        if commit is None:
            raise self._explained(ValueError("the hub names no commit"))
        return commit

    def _explained(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if self._is_local():
            return DataError(
                f"the data set {self.path} cannot be read as split {self.split!r}: {reason}",
                next_step="check the split's name, or read the files with the source jsonl or parquet",
            )
        return DataError(
            f"the data set {self.path!r} cannot be had from the hub: {type(error).__name__}: {reason}",
            next_step="check name, split and network; or download it and give the folder as `path`",
        )


def _checked(rows: Any, origin: Origin) -> RawItems:
    for number, values in enumerate(_as_dicts(rows), start=1):
        try:
            check_values(values, max_depth=_MAX_DEPTH)
        except BadRowError as error:
            yield reject_raw(error, origin=origin, line=number, raw=str(values)[:800])
        else:
            yield RawRow(values, number)


def _as_dicts(rows: Any) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield dict(row)
