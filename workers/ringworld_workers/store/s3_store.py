"""Objects in an S3 bucket, on AWS or on any server that speaks S3."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ringworld_workers.store.base import (
    Chunk,
    Conflict,
    NotFound,
    ObjectInfo,
    StoreError,
    Unfinished,
    check_key,
    is_key,
)
from ringworld_workers.store.check import check_store
from ringworld_workers.store.retry import HASTE, Effort, Passing, Patience, Watch
from ringworld_workers.store.s3_body import Part, cut
from ringworld_workers.store.s3_client import PreconditionFailed
from ringworld_workers.store.s3_download import get_object, read_into
from ringworld_workers.store.s3_requests import Requests
from ringworld_workers.store.s3_upload import abort, put_object, put_parts
from ringworld_workers.store.s3_url import parse_url

PART_BYTES = 64 << 20


class S3Store:
    """Objects under a prefix of a bucket. Implements ``Store``.

    Nothing is contacted before the first call. Endpoint, region and credentials come from where
    AWS's tools take them, in the process that makes the call: none is part of this object, which
    may be pickled.
    """

    def __init__(
        self,
        url: str,
        *,
        part_bytes: int = PART_BYTES,
        page_keys: int = 1000,
        patience: Patience | None = None,
    ) -> None:
        """Name bucket and prefix.

        Args:
            url: ``s3://BUCKET/PREFIX``; the prefix may be missing.
            part_bytes: what is longer goes up in parts of this size. AWS takes at least 5 MiB.
            page_keys: how many keys are listed or deleted by one request; S3 takes 1000.
            patience: how long a call may take.

        Raises:
            StoreError: it is no such url.
        """
        self.bucket, self.prefix = parse_url(url)
        self.url = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._part_bytes, self._page_keys = part_bytes, page_keys
        self._patience = patience or Patience()
        self._requests = Requests(self.url, self._patience)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: no connection and no credentials."""
        return {
            "url": self.url,
            "part_bytes": self._part_bytes,
            "page_keys": self._page_keys,
            "patience": self._patience,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Connect anew, when it is used."""
        self.__init__(**state)  # type: ignore[misc]

    def put(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Write what fits into one part by one request, and what is longer in parts."""
        place = self._place("put", key)
        parts = cut(chunks, self._part_bytes)
        first, second = next(parts), next(parts, None)
        if second is None:
            put_object(self._requests, self._effort("put", key), place, first)
        else:
            put_parts(self._requests, key, place, itertools.chain((first, second), parts))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """The server writes or refuses in one step."""
        return self._put_new("put_if_absent", key, data) is not None

    def put_if_match(self, key: str, data: bytes, etag: str | None) -> str:
        """The server compares and replaces in one step."""
        operation = "put_if_match"
        if etag is None:
            written = self._put_new(operation, key, data)
            if written is None:
                name = f"{self.url}/{key}"
                raise Conflict(operation, name, "it exists already; read it and decide again")
            return written
        effort = self._effort(operation, key)
        place, part = self._place(operation, key), Part([memoryview(data)])
        try:
            return put_object(self._requests, effort, place, part, IfMatch=f'"{etag}"')
        except (PreconditionFailed, NotFound):
            found = self._found_after_lost_reply(effort, key)
        if found is not None and found[0] == data:
            return found[1]
        reason = f"its etag is no longer {etag}; read it and decide again"
        raise Conflict(operation, effort.name, reason, attempts=effort.attempts)

    def get(self, key: str) -> bytes:
        """The whole object."""
        return get_object(self._requests, self._effort("get", key), self._place("get", key))[0]

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The whole object and the server's etag of it."""
        operation = "get_with_etag"
        return get_object(self._requests, self._effort(operation, key), self._place(operation, key))

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One ranged request, and another from where it broke off."""
        operation = "read"
        place = self._place(operation, key)
        read_into(self._requests, self._effort(operation, key), place, offset, buffers)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Complete objects. What other programs have put there under odd names is not listed."""
        found = [
            ObjectInfo(key, item["Size"], item["LastModified"].timestamp())
            for page in self._pages("list", prefix)
            for item in page.get("Contents", ())
            if is_key(key := self._key(item["Key"]))
        ]
        return sorted(found, key=lambda info: info.key)

    def folders(self, prefix: str = "") -> Sequence[str]:
        """What the keys under the prefix have before their next slash."""
        pages = self._pages("folders", prefix, Delimiter="/")
        found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        names = {name.rstrip("/").rpartition("/")[2] for name in found}
        return sorted(name for name in names if is_key(name))

    def delete(self, key: str) -> None:
        """Remove an object."""
        place = self._place("delete", key)
        self._requests.run(
            self._effort("delete", key), lambda client, _: client.delete_object(**place)
        )

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object under the prefix, a thousand a request, and abort uploads."""
        operation = "delete_prefix"
        pages = self._pages(operation, prefix)
        names = [item["Key"] for page in pages for item in page.get("Contents", ())]
        for first in range(0, len(names), self._page_keys):
            some = names[first : first + self._page_keys]
            self._delete_many(self._effort(operation, prefix), some)
        self.remove_unfinished(prefix, older_than_seconds=float("-inf"))

    def unfinished(self, prefix: str = "") -> Sequence[Unfinished]:
        """Multipart uploads that were neither completed nor aborted."""
        operation, start = "unfinished", self._start("unfinished", prefix)
        marker: dict[str, str] = {}
        found = []
        while True:
            place = {"Bucket": self.bucket, "Prefix": start, "MaxUploads": self._page_keys}
            request = partial(_list_uploads, {**place, **marker})
            page = self._requests.run(self._effort(operation, prefix), request)
            for upload in page.get("Uploads", ()):
                began = upload["Initiated"].timestamp()
                found.append(Unfinished(self._key(upload["Key"]), began, upload["UploadId"]))
            # AWS names key and upload where a page ends; SeaweedFS sorts by upload, and names that.
            ends = {name: page.get(f"Next{name}") for name in ("KeyMarker", "UploadIdMarker")}
            marker = {name: end for name, end in ends.items() if end}
            if not page.get("IsTruncated") or not marker:
                return sorted(found, key=lambda left: left.started)

    def remove_unfinished(self, prefix: str = "", older_than_seconds: float = 86400.0) -> int:
        """Abort uploads that were begun so long ago."""
        latest = time.time() - older_than_seconds
        old = [left for left in self.unfinished(prefix) if left.started <= latest]
        for left in old:
            upload = {"Bucket": self.bucket, "Key": self._name(left.key), "UploadId": left.handle}
            abort(self._requests, self._effort("remove_unfinished", left.key), upload)
        return len(old)

    def check_writable(self) -> None:
        """Try it out, in seconds."""
        check_store(S3Store(self.url, patience=HASTE))

    def _put_new(self, operation: str, key: str, data: bytes) -> str | None:
        """The new object's etag; None if there was one."""
        effort = self._effort(operation, key)
        place, part = self._place(operation, key), Part([memoryview(data)])
        try:
            return put_object(self._requests, effort, place, part, IfNoneMatch="*")
        except PreconditionFailed:
            found = self._found_after_lost_reply(effort, key)
        return found[1] if found is not None and found[0] == data else None

    def _found_after_lost_reply(self, effort: Effort, key: str) -> tuple[bytes, str] | None:
        """What is there now, if an earlier attempt may have written it."""
        if effort.attempts == 1:
            return None
        try:
            return self.get_with_etag(key)
        except NotFound:
            return None

    def _delete_many(self, effort: Effort, names: Sequence[str]) -> None:
        left = {name: None for name in names}

        def request(client: Any, _: object) -> None:
            keys = [{"Key": name} for name in left]
            reply = client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True}
            )
            errors = reply.get("Errors", [])
            refused = {error["Key"]: str(error.get("Code", "")) for error in errors}
            for name in list(left):
                if name not in refused:
                    del left[name]
            if left:
                name, code = next(iter(refused.items()))
                reason = f"{len(left)} objects are still there, such as {name} ({code})"
                if code == "AccessDenied":
                    reason += "; these credentials need s3:DeleteObject on the bucket"
                    raise StoreError(effort.operation, effort.name, reason)
                raise Passing(reason)

        self._requests.run(effort, request)

    def _pages(self, operation: str, prefix: str, **how: str) -> Iterator[dict[str, Any]]:
        """What S3 lists; each page may be asked for again."""
        start = self._start(operation, prefix)
        marker: dict[str, str] = {}
        while True:
            place = {"Bucket": self.bucket, "Prefix": start, "MaxKeys": self._page_keys}
            request = partial(_list_objects, {**place, **how, **marker})
            page = self._requests.run(self._effort(operation, prefix), request)
            yield page
            if not page.get("IsTruncated"):
                return
            marker = {"ContinuationToken": page["NextContinuationToken"]}

    def _effort(self, operation: str, key: str) -> Effort:
        return self._requests.effort(operation, key)

    def _place(self, operation: str, key: str) -> dict[str, str]:
        check_key(operation, key)
        return {"Bucket": self.bucket, "Key": self._name(key)}

    def _start(self, operation: str, prefix: str) -> str:
        """What the names of all objects in a folder begin with."""
        folder = prefix.rstrip("/")
        if prefix:
            check_key(operation, folder)
        name = self._name(folder).rstrip("/")
        return f"{name}/" if name else ""

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _key(self, name: str) -> str:
        return name[len(self.prefix) + 1 :] if self.prefix else name


def _list_objects(about: dict[str, Any], client: Any, _: Watch) -> dict[str, Any]:
    return dict(client.list_objects_v2(**about))


def _list_uploads(about: dict[str, Any], client: Any, _: Watch) -> dict[str, Any]:
    return dict(client.list_multipart_uploads(**about))
