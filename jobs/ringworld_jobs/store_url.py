"""Urls of stores, file://PATH and s3://BUCKET/PREFIX: read and checked without asking the store."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ringworld_jobs.problem import nearest

STORE_SCHEMES = ("file", "s3")
"""Kinds of store that checkpoints can go to."""
LONGEST_PREFIX_BYTES = 400
"""S3 takes keys of 1,024 bytes, and the names of runs, stages and objects come behind it."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
_HOW = "file://PATH or s3://BUCKET/PREFIX"
_ELSEWHERE = (
    "endpoint, region and credentials come from the environment or from AWS's own files "
    "(AWS_ENDPOINT_URL_S3, AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, ...)"
)


class UnsafeUrl(ValueError):
    """A url that may hold a credential: its text must not be shown."""


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A store's url, taken apart.

    Attributes:
        scheme: file or s3.
        bucket: of S3; empty for a folder.
        path: the folder, relative to the working directory or absolute; or the prefix in the
            bucket, without slashes around it, empty where there is none.
    """

    scheme: str
    bucket: str
    path: str

    def __str__(self) -> str:
        """The url, without a slash at its end."""
        inner = "/".join(part for part in (self.bucket, self.path) if part)
        return f"{self.scheme}://{inner}"


def parse_store(url: str) -> StoreUrl:
    """Take a store's url apart.

    Raises:
        UnsafeUrl: a part that looks like credentials or a query.
        ValueError: another scheme or none, no folder, or a bucket or prefix that S3 has not.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        word, colon, after = url.partition(":")
        if colon and nearest(word, STORE_SCHEMES):
            kind = nearest(word, STORE_SCHEMES)
            raise ValueError(
                f"a store is a URL with its scheme and ://; write {kind}://{after.lstrip('/')}"
            )
        raise ValueError(f"a store is a URL with its scheme; write file://{url}, or {_HOW}")
    if scheme not in STORE_SCHEMES:
        near = nearest(scheme, STORE_SCHEMES)
        meant = f"; did you mean {near}://?" if near else ""
        if scheme in ("http", "https"):
            meant = "; the address of an S3 server goes to AWS_ENDPOINT_URL_S3 in the environment"
        raise ValueError(f"no store of kind {scheme}://; there is {_HOW}{meant}")
    if scheme == "file":
        if not rest.strip("/"):
            raise ValueError("a store needs a folder: file://PATH")
        return StoreUrl("file", "", rest.rstrip("/"))
    return _s3(rest)


def _s3(rest: str) -> StoreUrl:
    bucket, _, prefix = rest.partition("/")
    if any(sign in rest for sign in "?#") or any(sign in bucket for sign in "@:"):
        raise UnsafeUrl(
            f"a store's URL holds bucket and prefix and nothing else: s3://BUCKET/PREFIX; "
            f"{_ELSEWHERE}"
        )
    _check_bucket(bucket)
    prefix = prefix.removesuffix("/")
    for part in prefix.split("/") if prefix else ():
        if not part or part.startswith(".") or any(ord(s) < 32 or s in "\\%\x7f" for s in part):
            raise ValueError(
                f"the prefix has a part {part!r}; a part is not empty, begins with no dot, and "
                "holds neither %, backslash nor control characters"
            )
    size = len(prefix.encode())
    if size > LONGEST_PREFIX_BYTES:
        raise ValueError(
            f"the prefix has {size} bytes; at most {LONGEST_PREFIX_BYTES} leave room for the keys "
            "behind it"
        )
    return StoreUrl("s3", bucket, prefix)


def _check_bucket(bucket: str) -> None:
    if not bucket:
        raise ValueError("a store on S3 needs a bucket: s3://BUCKET/PREFIX")
    sound = _BUCKET.fullmatch(bucket) and ".." not in bucket and not _ADDRESS.fullmatch(bucket)
    if sound:
        return
    meant = re.sub(r"[^a-z0-9.-]", "-", bucket.lower())
    hint = f"; did you mean {meant}?" if meant != bucket and _BUCKET.fullmatch(meant) else ""
    raise ValueError(
        f"{bucket!r} can be no bucket: 3 to 63 of a-z, 0-9, dash and dot, with a letter or digit "
        f"at both ends, no two dots in a row, and no IP address{hint}"
    )
