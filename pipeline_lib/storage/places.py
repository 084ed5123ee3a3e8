"""Input data on S3: `s3://bucket/key`, `s3://bucket/prefix/` and globs, through the store's connection."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, BinaryIO, cast

from botocore.exceptions import ClientError

from pipeline_lib.errors import DataError
from pipeline_lib.storage.s3 import MISSING_CODES, S3Settings, error_code, named_errors

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client

_GLOB = re.compile(r"[*?\[]")

Places = list[str]


class S3Places:
    """Finds and opens input files on the store's S3 server, in any bucket."""

    def __init__(self, client: S3Client, settings: S3Settings) -> None:
        """Take the store's client, and its settings for messages."""
        self._client, self._settings = client, settings

    def list(self, place: str) -> Places:
        """Return the object itself, those below a prefix, or those a glob matches, sorted.

        Raises:
            DataError: There is nothing at this place.
            PipelineError: The server cannot be asked.
        """
        bucket, key = _parts(place)
        glob = _GLOB.search(key)
        prefix = key[: glob.start()] if glob else key
        keys = self._keys(bucket, prefix)
        if glob:
            pattern = re.compile(_glob_pattern(key))
            keys = [found for found in keys if pattern.fullmatch(found)]
        elif key in keys:
            keys = [key]
        else:
            folder = key.rstrip("/") + "/" if key else ""
            keys = [found for found in keys if found.startswith(folder) and not found.endswith("/")]
        if not keys:
            raise DataError(f"there is nothing at {place}", next_step="correct the bucket or the key")
        return sorted(f"s3://{bucket}/{found}" for found in keys)

    def open(self, place: str) -> BinaryIO:
        """Open an object as a stream that does not seek.

        Raises:
            DataError: It does not exist.
            PipelineError: The server cannot be asked.
        """
        bucket, key = _parts(place)
        settings = self._for_bucket(bucket)
        with named_errors(settings, f"opening {place}"):
            try:
                body = self._client.get_object(Bucket=bucket, Key=key)["Body"]
            except ClientError as error:
                if error_code(error) in MISSING_CODES:
                    raise DataError(f"{place} does not exist", next_step="correct the bucket or the key") from error
                raise
        return cast("BinaryIO", _ObjectStream(body, settings, place))

    def _keys(self, bucket: str, prefix: str) -> Places:
        with named_errors(self._for_bucket(bucket), f"listing s3://{bucket}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def _for_bucket(self, bucket: str) -> S3Settings:
        return self._settings.model_copy(update={"bucket": bucket, "prefix": ""})


class _ObjectStream(io.RawIOBase):
    """An object's bytes; a connection that breaks while reading is named like any other."""

    def __init__(self, body: StreamingBody, settings: S3Settings, place: str) -> None:
        super().__init__()
        self._body, self._settings, self._place = body, settings, place

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        with named_errors(self._settings, f"reading {self._place}"):
            return self._body.read(None if size is None or size < 0 else size)

    def close(self) -> None:
        self._body.close()
        super().close()


def _parts(place: str) -> tuple[str, str]:
    bucket, _, key = place.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{place!r} names no bucket", next_step="write s3://bucket/key")
    return bucket, key


def _glob_pattern(glob: str) -> str:
    r"""Return the regular expression of a glob; `*` and `?` stop at a slash, `**` does not."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", glob)
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meanings.get(piece, piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )
