"""Writing objects to S3: by one request, or in parts."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from awscrt.checksums import crc32c

from ringworld_workers.store.base import StoreError
from ringworld_workers.store.retry import HASTE, Effort, Watch
from ringworld_workers.store.s3_body import Part, body_of
from ringworld_workers.store.s3_requests import Requests


def put_object(
    requests: Requests, effort: Effort, place: dict[str, str], part: Part, **condition: str
) -> str:
    """Write an object by one request, of which the server checks the checksum.

    Args:
        requests: to make it with.
        effort: the call that it is part of.
        place: Bucket and Key.
        part: the whole object.
        **condition: IfNoneMatch or IfMatch.

    Returns:
        The etag.

    Raises:
        PreconditionFailed: the condition does not hold.
        StoreError: it was not written, or nobody knows.
    """

    def request(client: Any, watch: Watch) -> str:
        reply = client.put_object(
            **place,
            **condition,
            Body=body_of(part, watch),
            ContentLength=part.size,
            ChecksumCRC32C=encode(part.crc32c),
        )
        return plain_etag(reply)

    return requests.run(effort, request)


def put_parts(requests: Requests, key: str, place: dict[str, str], parts: Iterable[Part]) -> None:
    """Write an object in parts; until the last one has arrived and all are joined, none is seen.

    A part's memory is held until the server has acknowledged it, so that it can be sent again.

    Args:
        requests: to make it with.
        key: for errors.
        place: Bucket and Key.
        parts: in order; all but the last at least 5 MiB.

    Raises:
        StoreError: it was not written. What the source of ``parts`` raises goes through. In both
            cases the parts that did arrive are removed, if the server can be reached.
    """
    made = requests.run(
        requests.effort("put", key),
        lambda client, _: client.create_multipart_upload(**place, ChecksumAlgorithm="CRC32C"),
    )
    upload = {**place, "UploadId": made["UploadId"]}
    try:
        sums, done, size = b"", [], 0
        for number, part in enumerate(parts, 1):
            done.append(_put_part(requests, key, upload, number, part))
            sums += part.crc32c.to_bytes(4, "big")
            size += part.size
        whole = f"{encode(crc32c(sums))}-{len(done)}"
        _complete(requests, key, upload, done, whole, size)
    except BaseException:
        with suppress(StoreError):  # what went wrong first is what the caller must know
            abort(requests, requests.effort("put", key, HASTE), upload)
        raise


def abort(requests: Requests, effort: Effort, upload: dict[str, str]) -> None:
    """Remove the parts of an upload; one that is gone is no error.

    Raises:
        StoreError: they may still be there.
    """

    def request(client: Any, _: Watch) -> None:
        with suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(**upload)

    requests.run(effort, request)


def encode(checksum: int) -> str:
    """A checksum as S3's headers have it."""
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def plain_etag(reply: dict[str, Any]) -> str:
    """The etag in a reply, without its quotes."""
    return str(reply["ETag"]).strip('"')


def _put_part(
    requests: Requests, key: str, upload: dict[str, str], number: int, part: Part
) -> dict[str, Any]:
    checksum = encode(part.crc32c)

    def request(client: Any, watch: Watch) -> dict[str, Any]:
        reply = client.upload_part(
            **upload,
            PartNumber=number,
            Body=body_of(part, watch),
            ContentLength=part.size,
            ChecksumCRC32C=checksum,
        )
        return {"PartNumber": number, "ETag": reply["ETag"], "ChecksumCRC32C": checksum}

    return requests.run(requests.effort("put", key), request)


def _complete(
    requests: Requests,
    key: str,
    upload: dict[str, str],
    parts: list[dict[str, Any]],
    checksum: str,
    size: int,
) -> None:
    """Join the parts. Where the reply is lost, the object is looked at."""
    effort = requests.effort("put", key)
    place = {name: upload[name] for name in ("Bucket", "Key")}

    def request(client: Any, _: Watch) -> None:
        try:
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                raise
            found = (
                client.head_object(**place, ChecksumMode="ENABLED") if effort.attempts > 1 else {}
            )
            same = found.get("ChecksumCRC32C", checksum) == checksum
            if not same or found.get("ContentLength") != size:
                raise StoreError(
                    effort.operation,
                    effort.name,
                    "its upload was removed while it was under way; nothing was written",
                ) from error

    requests.run(effort, request, requests.patience.completion_seconds)
