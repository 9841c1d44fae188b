"""Reading objects from S3, straight into place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from awscrt.checksums import crc32c

from ringworld_workers.store.base import StoreError, truncated
from ringworld_workers.store.retry import Effort, Passing, Watch
from ringworld_workers.store.s3_client import PreconditionFailed
from ringworld_workers.store.s3_requests import Requests
from ringworld_workers.store.s3_upload import encode, plain_etag

_PIECE_BYTES = 256 << 10
_GAIN_BYTES = 1 << 20


class Target:
    """Buffers that are filled one after the other."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        """Begin with the first byte of the first of these byte views."""
        self._rest = [buffer for buffer in reversed(buffers) if len(buffer)]
        self.left = sum(len(buffer) for buffer in self._rest)

    def put(self, data: bytes) -> None:
        """Fill in the next bytes; there is room for them."""
        view = memoryview(data)
        while view:
            buffer = self._rest.pop()
            count = min(len(buffer), len(view))
            buffer[:count] = view[:count]
            if count < len(buffer):
                self._rest.append(buffer[count:])
            view = view[count:]
            self.left -= count


def get_object(requests: Requests, effort: Effort, place: dict[str, str]) -> tuple[bytes, str]:
    """A whole small object and its etag, compared with the checksum that S3 holds of it.

    Args:
        requests: to make it with.
        effort: the call that it is part of.
        place: Bucket and Key.

    Raises:
        NotFound: there is none.
        StoreError: it was not read.
    """

    def request(client: Any, watch: Watch) -> tuple[bytes, str]:
        reply = client.get_object(**place, ChecksumMode="ENABLED")
        size = reply.get("ContentLength")
        if size is None:
            raise Passing("the reply does not say how long it is")
        data = bytearray(size)
        _fill(reply, Target([memoryview(data)]), watch)
        wanted = reply.get("ChecksumCRC32C", "")
        if wanted and "-" not in wanted and wanted != encode(crc32c(data)):
            raise Passing("the bytes are not those of the checksum that S3 holds", once=True)
        return bytes(data), plain_etag(reply)

    return requests.run(effort, request)


def read_into(
    requests: Requests,
    effort: Effort,
    place: dict[str, str],
    offset: int,
    buffers: Sequence[memoryview],
) -> None:
    """Fill buffers from consecutive bytes; after a break, go on from the byte that was reached.

    Args:
        requests: to make them with.
        effort: the call that it is part of.
        place: Bucket and Key.
        offset: of the first byte.
        buffers: writable byte views, filled one after the other.

    Raises:
        NotFound: there is no such object.
        StoreError: it is shorter, was replaced meanwhile, or could not be read.
    """
    target = Target(buffers)
    if not target.left:
        requests.run(effort, lambda client, _: client.head_object(**place))
        return
    end = offset + target.left
    condition: dict[str, str] = {}

    def request(client: Any, watch: Watch) -> None:
        begin = end - target.left
        if begin == end:
            return  # the last byte came just when the attempt before was given up
        try:
            reply = client.get_object(**place, **condition, Range=f"bytes={begin}-{end - 1}")
        except client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") != "InvalidRange":
                raise
            size = client.head_object(**place)["ContentLength"]
            raise truncated(effort.name, size, offset, end) from error
        size = _size(reply, begin)
        if size < end:
            reply["Body"].close()
            raise truncated(effort.name, size, offset, end)
        condition["IfMatch"] = str(reply["ETag"])
        try:
            _fill(reply, target, watch)
        finally:
            if end - target.left - begin >= _GAIN_BYTES:
                effort.gained()

    try:
        requests.run(effort, request)
    except PreconditionFailed as error:
        raise StoreError(
            effort.operation, effort.name, "it was replaced while it was being read"
        ) from error


def _fill(reply: dict[str, Any], target: Target, watch: Watch) -> None:
    """Move a reply's body into place, in small pieces as they come.

    Raises:
        Passing: it ends early, or comes too slowly.
    """
    with reply["Body"] as raw:
        while target.left:
            data = raw.read1(min(_PIECE_BYTES, target.left))
            if not data:
                raise Passing(f"the reply was cut off {target.left} bytes before its end")
            watch.moved(len(data), partial(target.put, data))
        raw.drain_conn()  # so that the connection serves again


def _size(reply: dict[str, Any], begin: int) -> int:
    """The whole object's size, as a ranged reply gives it.

    Raises:
        Passing: it is not the range that was asked for.
    """
    said = str(reply.get("ContentRange", ""))
    first, _, size = said.removeprefix("bytes ").replace("-", "/").partition("/")
    whole = size.rpartition("/")[2]
    if first != str(begin) or not whole.isdecimal():
        reply["Body"].close()
        raise Passing(f"bytes from {begin} were asked for, and {said or 'everything'} came")
    return int(whole)
