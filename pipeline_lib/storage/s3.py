"""The S3 client and its errors in words: every failure names its cause and what to do.

Keys come from the standard AWS chain (environment, profile, role) and are never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from pipeline_lib.errors import AuthError, BucketError, ConflictError, PipelineError, StorageError
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_ATTEMPTS = 6
_AUTH_CODES = frozenset(
    {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
     "TokenRefreshRequired", "Forbidden"}
)  # fmt: skip
MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})
PRECONDITION_CODES = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})


class S3Settings(Frozen):
    """Where artifacts are kept."""

    endpoint_url: str | None = None
    """Address of the server; None is Amazon's own."""
    bucket: str = "prefline"
    prefix: str = ""
    """Everything is kept below it, without slashes at its ends."""
    region: str = "us-east-1"

    def key(self, path: str) -> str:
        """Return a key below the prefix."""
        return f"{self.prefix}/{path}" if self.prefix else path


def open_client(settings: S3Settings) -> S3Client:
    """Open a client with bounded retries: at most 6 tries, with growing random pauses."""
    return boto3.client(
        "s3", endpoint_url=settings.endpoint_url, region_name=settings.region,
        config=Config(
            retries={"total_max_attempts": MAX_ATTEMPTS, "mode": "standard"}, connect_timeout=3, read_timeout=60,
            s3={"addressing_style": "path" if settings.endpoint_url else "auto"}, max_pool_connections=16,
        ),
    )  # fmt: skip


def error_code(error: ClientError) -> str:
    """Return the server's code of an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def named_errors(settings: S3Settings, action: str) -> Iterator[None]:
    """Turn botocore's errors into ours.

    Args:
        settings: Names the server and the bucket in messages.
        action: What was being done, e.g. `reading blobs/ab/...`.

    Raises:
        PipelineError: AuthError, BucketError, ConflictError or StorageError.
    """
    place = settings.endpoint_url or "Amazon S3"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AuthError(
            f"no credentials for {place}: {error}",
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role",
        ) from error
    except ClientError as error:
        raise _named(settings, place, action, error) from error
    except (EndpointConnectionError, ConnectionError, HTTPClientError) as error:
        raise StorageError(
            f"{place} cannot be reached while {action} ({type(error).__name__})",
            next_step="check that the server runs and that PREFLINE_S3_ENDPOINT is right; "
            "nothing finished is lost, run the same command again",
        ) from error
    except BotoCoreError as error:
        raise StorageError(f"{place}: {error} while {action}", next_step="check the S3 settings") from error


def _named(settings: S3Settings, place: str, action: str, error: ClientError) -> PipelineError:
    code = error_code(error)
    if code == "NoSuchBucket":
        return BucketError(
            f"the bucket {settings.bucket!r} does not exist at {place}",
            next_step=f"create it, or set PREFLINE_S3_BUCKET to one that exists (was {action})",
        )
    if code in _AUTH_CODES:
        return AuthError(
            f"{place} refused the credentials ({code}) while {action}",
            next_step="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) and their rights "
            f"on bucket {settings.bucket!r}",
        )
    if code in PRECONDITION_CODES:
        return ConflictError(
            f"another process wrote first while {action}", next_step="run the same command again"
        )
    return StorageError(
        f"{place} answered {code or 'an error'} while {action}",
        next_step="look at the server, then run again",
    )
