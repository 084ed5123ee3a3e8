"""The S3 client and its errors in words: every failure names its cause and what to do.

Keys come from the standard AWS chain (environment, profile, role) and are never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import boto3
import botocore.session
from botocore import exceptions as boto_errors
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import Loader, create_loader
from pydantic import Field, field_validator

from pipeline_lib.errors import (
    AuthError,
    BucketError,
    ConfigError,
    ConflictError,
    IntegrityError,
    PipelineError,
    StorageError,
)
from pipeline_lib.validation import Frozen

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MISSING_CODES = frozenset({"404", "NoSuchKey", "NotFound"})
PRECONDITION_CODES = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})
_AUTH_CODES = frozenset(
    {"401", "403", "AccessDenied", "ExpiredToken", "Forbidden", "InvalidAccessKeyId", "InvalidToken",
     "SignatureDoesNotMatch", "TokenRefreshRequired"}
)  # fmt: skip
_REGION_CODES = frozenset(
    {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
)
_NO_KEYS = (
    boto_errors.CredentialRetrievalError,
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.ProfileNotFound,
    boto_errors.SSOError,
    boto_errors.TokenRetrievalError,
)
UNREACHABLE = (boto_errors.ConnectionError, boto_errors.HTTPClientError)


class S3Settings(Frozen):
    """Where artifacts are kept. Holds no keys."""

    endpoint_url: str | None = None
    """Address of the server; None is Amazon's own."""
    bucket: str = "prefline"
    prefix: str = ""
    """Everything is kept below it."""
    region: str = "us-east-1"
    max_attempts: int = Field(6, ge=1, le=6)
    """Tries of one request, with growing random pauses between them."""
    read_timeout_s: float = Field(60.0, gt=0)
    """Longest silence of the server within one try."""

    @field_validator("prefix")
    @classmethod
    def _without_outer_slashes(cls, prefix: str) -> str:
        return prefix.strip("/")

    @property
    def place(self) -> str:
        """The server's name for messages."""
        return self.endpoint_url or "Amazon S3"

    def key(self, path: str) -> str:
        """Return a key below the prefix."""
        return f"{self.prefix}/{path}" if self.prefix else path


def open_client(settings: S3Settings) -> S3Client:
    """Open a client whose tries are bounded and whose first contact fails within seconds.

    Raises:
        ConfigError: The endpoint is no URL.
        AuthError: A named profile does not exist.
    """
    config = Config(
        # This mode pauses up to 1, 2, 4, 8 and 16 s, so that a server may restart; the newer ones give
        # up within a second.
        retries={"total_max_attempts": settings.max_attempts, "mode": "legacy"},
        connect_timeout=3, read_timeout=settings.read_timeout_s, max_pool_connections=16,
        s3={"addressing_style": "path" if settings.endpoint_url else "auto"},
    )  # fmt: skip
    with named_errors(settings, "opening the connection"):
        try:
            # A session of its own: boto3's shared one keeps the first keys it saw, and is not thread-safe.
            session = botocore.session.Session()
            session.register_component("data_loader", _loader())
            return boto3.session.Session(botocore_session=session).client(
                "s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config
            )
        except ValueError as error:
            raise ConfigError(
                f"the S3 endpoint {settings.endpoint_url!r} is no URL",
                next_step="set PREFLINE_S3_ENDPOINT to something like http://host:port, or to `aws`",
            ) from error


@cache
def _loader() -> Loader:
    """Return botocore's description of S3, which takes 0.1 s to read."""
    return create_loader()


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
        PipelineError: AuthError, BucketError, ConflictError, IntegrityError or StorageError.
    """
    try:
        yield
    except ClientError as error:
        raise _named(settings, action, error) from error
    except _NO_KEYS as error:
        raise AuthError(
            f"no credentials for {settings.place}: {error}",
            next_step="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role that exists",
        ) from error
    except boto_errors.FlexibleChecksumError as error:
        raise IntegrityError(
            f"{settings.place} sent bytes that do not match their own checksum while {action}",
            next_step="run `prefline fsck`; if it finds nothing, look at the network between",
        ) from error
    except boto_errors.ParamValidationError as error:
        raise BucketError(
            f"{settings.bucket!r} cannot be a bucket or key ({' '.join(str(error).split())}) while {action}",
            next_step="correct PREFLINE_S3_BUCKET or PREFLINE_S3_PREFIX",
        ) from error
    except UNREACHABLE as error:
        raise StorageError(
            f"{settings.place} cannot be reached while {action} ({type(error).__name__})",
            next_step="check that the server runs and that PREFLINE_S3_ENDPOINT is right; "
            "nothing finished is lost, run the same command again",
        ) from error
    except BotoCoreError as error:
        raise StorageError(
            f"{settings.place}: {error} while {action}",
            next_step="look at the server and the network between, then run the same command again",
        ) from error


def _named(settings: S3Settings, action: str, error: ClientError) -> PipelineError:
    code = error_code(error)
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return BucketError(
            f"the bucket {settings.bucket!r} does not exist at {settings.place}",
            next_step=f"create it, or set PREFLINE_S3_BUCKET to one that exists (was {action})",
        )
    if code in _REGION_CODES:
        return BucketError(
            f"the bucket {settings.bucket!r} is not in the region {settings.region!r} ({code})",
            next_step="set AWS_DEFAULT_REGION to the bucket's region",
        )
    if code == "RequestTimeTooSkewed":
        return AuthError(
            f"{settings.place} refused the request: this machine's clock is wrong",
            next_step="set the clock (NTP), then run the same command again",
        )
    if code in _AUTH_CODES:
        return AuthError(
            f"{settings.place} refused the credentials ({code}) while {action}",
            next_step="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) and their rights "
            f"on bucket {settings.bucket!r}",
        )
    if code in PRECONDITION_CODES:
        return ConflictError(f"another process wrote first while {action}", next_step="run the same command again")
    tries = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1
    return StorageError(
        f"{settings.place} answered {code or 'an error'} to {tries} tries while {action}",
        next_step="look at the server, then run the same command again; nothing finished is lost",
    )
