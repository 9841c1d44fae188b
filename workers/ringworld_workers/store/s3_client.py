"""boto3's client of S3, and what its errors mean. The one file here that imports boto3."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore import exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError, ReadTimeoutError

from ringworld_workers.store.base import NotFound, StoreError
from ringworld_workers.store.retry import Passing, Patience

_CONNECT_SECONDS = 10.0
_CONNECTIONS = 32
_ENDPOINT_FROM = (
    "the endpoint comes from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's endpoint_url"
)
_CREDENTIALS_FROM = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"
)
_RIGHTS = {
    "put": "s3:PutObject",
    "put_if_absent": "s3:PutObject",
    "put_if_match": "s3:PutObject and s3:GetObject",
    "get": "s3:GetObject",
    "get_with_etag": "s3:GetObject",
    "read": "s3:GetObject",
    "list": "s3:ListBucket",
    "folders": "s3:ListBucket",
    "delete": "s3:DeleteObject",
    "delete_prefix": "s3:DeleteObject and s3:ListBucket",
    "unfinished": "s3:ListBucketMultipartUploads",
    "remove_unfinished": "s3:AbortMultipartUpload",
}
_OF_ONE_OBJECT = {"get", "get_with_etag", "read", "put_if_match"}
_PASSING = {
    "BadGateway",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "PriorRequestNotComplete",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_CORRUPTED = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "IncompleteBody"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_UNKNOWN_KEYS = {
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
_OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "StorageFull"}


class PreconditionFailed(Exception):
    """A conditional request found the object other than the caller said."""


def connect(patience: Patience, operation: str, name: str) -> Any:
    """A client whose endpoint, region and credentials come from where AWS's tools take them.

    It tries nothing again by itself. No bucket is asked for anything yet, but the search for
    credentials may run a program or ask the machine's role.

    Args:
        patience: gives the limits of connecting and reading.
        operation: that needs it, for errors.
        name: on which object, for errors.

    Raises:
        StoreError: the configuration is not one.
        Passing: the source of credentials does not answer.
    """
    settings: dict[str, Any] = {
        "connect_timeout": min(_CONNECT_SECONDS, patience.reply_seconds),
        "read_timeout": max(patience.reply_seconds, patience.completion_seconds),
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "max_pool_connections": _CONNECTIONS,
        # Ranges have no checksums of their own, and writes bring theirs.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    try:
        session = boto3.Session()
        client = session.client("s3", config=Config(**settings))
        of_s3 = _settings_of_s3(client)
        if of_s3:
            client = session.client("s3", config=Config(**settings, s3=of_s3))
        return client
    except (exceptions.BotoCoreError, ValueError) as error:
        reason = _configuration(error)
        if reason is None:
            raise Passing(_lost(error)) from error
        raise StoreError(operation, name, reason) from error


def _settings_of_s3(client: Any) -> dict[str, Any]:
    """What the endpoint calls for beyond the user's own settings of it."""
    held = dict(client.meta.config.s3 or {})
    parts = urlsplit(client.meta.endpoint_url)
    if not (parts.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        # A server of one's own rarely has a name for each bucket.
        held.setdefault("addressing_style", "path")
    if parts.scheme == "https":
        # TLS protects the bytes and CRC32C tells of flipped ones: a SHA-256 would be a third pass.
        held.setdefault("payload_signing_enabled", False)
    return held


def where(client: Any) -> str:
    """The endpoint, and what it comes from, for errors that may be due to a wrong one."""
    return f"({endpoint(client)}; {_ENDPOINT_FROM})"


def endpoint(client: Any) -> str:
    """Scheme, host and port that the client talks to."""
    parts = urlsplit(client.meta.endpoint_url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"


def translate(error: Exception, operation: str, name: str, client: Any) -> Exception:
    """What a failed request means to a store.

    Args:
        error: that boto3 raised, or reading a reply's body.
        operation: of the store.
        name: of the object, as errors give it.
        client: that made the request.

    Returns:
        Passing where trying again may help, PreconditionFailed, NotFound or another StoreError.
        None holds a credential or a signature.
    """
    if isinstance(error, exceptions.ClientError):
        return _refusal(error, operation, name, client)
    if isinstance(error, exceptions.BotoCoreError):
        inner = error.kwargs.get("error") if hasattr(error, "kwargs") else None
        if isinstance(inner, Passing):  # raised by the body that was being sent
            return inner
    reason = _configuration(error)
    if reason is not None:
        return StoreError(operation, name, reason)
    return Passing(f"{_lost(error)} {where(client)}")


def _refusal(error: Any, operation: str, name: str, client: Any) -> Exception:
    """What an error reply means."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())[:200]
    at = endpoint(client)
    if code == "PreconditionFailed" or status == 412:
        return PreconditionFailed(said)
    if code == "NoSuchBucket":
        bucket = name.split("/")[2]
        return StoreError(
            operation,
            name,
            f"there is no bucket {bucket} at {at}; create it with `aws s3 mb s3://{bucket}`, or "
            f"name another ({_ENDPOINT_FROM})",
        )
    if code in ("NoSuchKey", "404") and operation in _OF_ONE_OBJECT:
        return NotFound(operation, name, "there is no such object")
    if code in _CORRUPTED:
        # Once, the network may have flipped a bit; twice, memory or the program is at fault.
        return Passing(f"the bytes did not arrive as they were sent ({code})", once=True)
    if (
        code in _PASSING
        or status in (408, 409, 429)
        or (status >= 500 and status not in (501, 507))
    ):
        return Passing(f"{at} answers {_answer(status, code, said)}")
    return StoreError(operation, name, _remedy(operation, code, status, said, at))


def _remedy(operation: str, code: str, status: int, said: str, at: str) -> str:
    """Why a request is refused for good, and what to do."""
    if code in _EXPIRED:
        return f"the credentials have expired ({code}); renew them, then start again"
    if code in _UNKNOWN_KEYS:
        return f"{at} does not accept the credentials ({code}); {_CREDENTIALS_FROM}"
    if code == "RequestTimeTooSkewed":
        return "this machine's clock is wrong by more than the server allows; set it"
    if code in _OTHER_REGION or status in (301, 307):
        return (
            f"the bucket is in another region ({code or status}); set AWS_DEFAULT_REGION to its own"
        )
    if status in (401, 403):
        right = _RIGHTS.get(operation, "access")
        return f"access denied ({code}); these credentials need {right} on the bucket"
    if code in _FULL or status == 507:
        return f"the store is full or over its quota ({code}); free space, then start again"
    if code == "NoSuchUpload":
        return "its upload was removed while it was under way, by a clean-up or another program"
    if code == "EntityTooLarge":
        return "the object is larger than the server takes (EntityTooLarge)"
    return f"{at} answers {_answer(status, code, said)}; is it an S3 endpoint? {_ENDPOINT_FROM}"


def _answer(status: int, code: str, said: str) -> str:
    return f"{status} {said}" if code == str(status) else f"{status} {code}: {said}"


def _configuration(error: Exception) -> str | None:
    """What is wrong on this machine, with the remedy; None where it may be the network."""
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return f"no complete credentials were found; {_CREDENTIALS_FROM}"
    if isinstance(error, exceptions.SSOError | exceptions.LoginError):
        return "the login has expired or is missing; log in anew (`aws sso login`)"
    if isinstance(error, exceptions.TokenRetrievalError):
        return "the login's token cannot be renewed; log in anew (`aws sso login`)"
    if isinstance(error, exceptions.ProfileNotFound):
        return f"{error}; correct AWS_PROFILE"
    if isinstance(error, exceptions.SSLError):
        said = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in said:
            return "the server's certificate is not trusted; name its authority in AWS_CA_BUNDLE"
        if "WRONG_VERSION_NUMBER" in said or "record layer" in said:
            return f"the server speaks no TLS; write http:// ({_ENDPOINT_FROM})"
        return None
    network = (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
        ResponseParserError,
        HTTPError,
        OSError,
    )
    if isinstance(error, network):
        return None
    if isinstance(error, exceptions.BotoCoreError):
        return f"{error}; correct AWS's settings ({_ENDPOINT_FROM})"
    if isinstance(error, ValueError):  # whose text has the url, and a password if that has one
        return f"the endpoint is no url; write https://HOST:PORT ({_ENDPOINT_FROM})"
    return f"{type(error).__name__}: {error}"


def _lost(error: Exception) -> str:
    """How a request or its reply was lost, without the request."""
    if isinstance(error, exceptions.EndpointConnectionError):
        return "nothing answers there, or its name is unknown"
    if isinstance(error, exceptions.ProxyConnectionError):
        return "the proxy does not answer"
    if isinstance(error, exceptions.ConnectTimeoutError):
        return "no connection in time"
    if isinstance(error, exceptions.ReadTimeoutError | ReadTimeoutError | TimeoutError):
        return "no reply in time"
    if isinstance(error, exceptions.CredentialRetrievalError | exceptions.MetadataRetrievalError):
        return "the source of credentials does not answer"
    if isinstance(error, ResponseParserError):
        return "the reply is not S3's, or was cut off"
    return "the connection broke"
