"""Bucket and prefix from a url."""

from __future__ import annotations

import re

from ringworld_workers.store.base import StoreError, check_key

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def parse_url(url: str) -> tuple[str, str]:
    """Bucket and prefix.

    Raises:
        StoreError: it is no url of an S3 prefix; a password in it is not repeated.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:
        raise StoreError(
            "open",
            f"{scheme}://...@{bucket.rpartition('@')[2]}",
            "credentials do not belong into a url; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, and write s3://BUCKET/PREFIX",
        )
    if "?" in rest or "#" in rest:
        raise StoreError(
            "open",
            re.split("[?#]", url)[0],
            "an s3 url has no ? and no #; the endpoint comes from AWS_ENDPOINT_URL_S3, the region "
            "from AWS_DEFAULT_REGION",
        )
    if not bucket:
        raise StoreError("open", url, "no bucket is named; write s3://BUCKET/PREFIX")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise StoreError(
            "open",
            url,
            f"{bucket!r} is no bucket's name: 3 to 63 lower-case letters, digits, dots and "
            "hyphens; the endpoint comes from AWS_ENDPOINT_URL_S3",
        )
    prefix = prefix.rstrip("/")
    if prefix:
        check_key("open", prefix)
    return bucket, prefix
