"""S3 errors in words: each fault gives its own class, a cause and a next step."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from botocore.exceptions import ClientError, FlexibleChecksumError, IncompleteReadError, ReadTimeoutError

from pipeline_lib.errors import (
    AuthError,
    BucketError,
    ConfigError,
    ConflictError,
    IntegrityError,
    PipelineError,
    StorageError,
)
from pipeline_lib.storage.objects import _age_s
from pipeline_lib.storage.s3 import S3Settings, named_errors, open_client

SETTINGS = S3Settings(endpoint_url="http://127.0.0.1:9", bucket="b")


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("NoSuchBucket", BucketError, "the bucket 'b' does not exist"),
        ("InvalidBucketName", BucketError, "PREFLINE_S3_BUCKET"),
        ("PermanentRedirect", BucketError, "region 'us-east-1'"),
        ("InvalidAccessKeyId", AuthError, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", AuthError, "refused the credentials"),
        ("ExpiredToken", AuthError, "AWS_SESSION_TOKEN"),
        ("403", AuthError, "rights"),
        ("RequestTimeTooSkewed", AuthError, "clock"),
        ("PreconditionFailed", ConflictError, "another process"),
        ("ConditionalRequestConflict", ConflictError, "another process"),
        ("SlowDown", StorageError, "answered SlowDown to 6 tries"),
        ("InternalError", StorageError, "look at the server"),
        ("", StorageError, "answered an error"),
    ],
)
def test_answers_of_the_server(code: str, expected: type[PipelineError], words: str) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"RetryAttempts": 5}}
    with pytest.raises(expected, match=words) as caught, named_errors(SETTINGS, "writing x"):
        raise ClientError(response, "PutObject")  # type: ignore[arg-type]
    assert type(caught.value) is expected
    assert "\n" not in caught.value.cause
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ReadTimeoutError(endpoint_url="http://x"), StorageError),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), StorageError),
        (FlexibleChecksumError(error_msg="crc32 differs"), IntegrityError),
    ],
)
def test_failures_of_the_connection(error: Exception, expected: type[PipelineError]) -> None:
    with pytest.raises(expected, match="reading blobs/ab"), named_errors(SETTINGS, "reading blobs/ab"):
        raise error


def test_only_what_may_pass_is_transient() -> None:
    assert StorageError.is_transient
    assert not any(cls.is_transient for cls in (AuthError, BucketError, IntegrityError, ConflictError))


def test_an_endpoint_that_is_no_url() -> None:
    with pytest.raises(ConfigError, match="'localhost:8333' is no URL"):
        open_client(S3Settings(endpoint_url="localhost:8333"))


def test_a_profile_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(AuthError, match="no-such-profile"):
        open_client(S3Settings(endpoint_url="http://127.0.0.1:9"))


@pytest.mark.parametrize(("given", "key"), [("", "blobs/x"), ("team/a", "team/a/blobs/x"), ("/team/", "team/blobs/x")])
def test_keys_are_below_the_prefix(given: str, key: str) -> None:
    assert S3Settings(prefix=given).key("blobs/x") == key


def test_settings_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    assert "not-to-be-seen" not in SETTINGS.model_dump_json()


def test_ages_are_by_the_servers_clock() -> None:
    """Neither clock is this machine's: both are of the year 2001."""
    answer = {"ResponseMetadata": {"HTTPHeaders": {"date": "Mon, 01 Jan 2001 00:01:30 GMT"}}}
    assert _age_s(answer, datetime(2001, 1, 1, tzinfo=UTC)) == 90.0
