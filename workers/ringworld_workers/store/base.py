"""Objects by key: what checkpoints and run state need of a store.

No torch here: the platform uses stores too. An object appears whole or not at all, and whoever has
been told that it is written will find it after a crash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Chunk = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing."""

    key: str
    size: int
    modified: float = field(default=0.0, compare=False)
    """When it was written, in seconds since the epoch."""


@dataclass(frozen=True)
class Unfinished:
    """What an interrupted writer left: parts that no listing shows."""

    key: str
    """Of the object that was being written, as far as the store knows it."""
    started: float
    """Seconds since the epoch."""
    handle: str
    """What the store calls it: a hidden file's key, or an upload's id."""


class StoreError(RuntimeError):
    """An operation on the store failed."""

    def __init__(
        self, operation: str, key: str, reason: str, *, transient: bool = False, attempts: int = 1
    ) -> None:
        """Name what failed.

        Args:
            operation: what was tried: put, get, list, ...
            key: on which object, with the store's url where that helps.
            reason: why, and what to do about it.
            transient: whether the same call may succeed if it is tried again later.
            attempts: how often the store has tried already.
        """
        tried = f", tried {attempts} times" if attempts > 1 else ""
        hint = f" (trying again may help{tried})" if transient else f" ({tried[2:]})" * bool(tried)
        super().__init__(f"{operation} {key}: {reason}{hint}")
        self.operation, self.key, self.reason = operation, key, reason
        self.transient, self.attempts = transient, attempts

    @property
    def facts(self) -> dict[str, bool]:
        """What those who judge the failure need to know, as plain data."""
        return {"store_away": self.transient}

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling: Ray carries errors between processes."""
        fields = (self.operation, self.key, self.reason, self.transient, self.attempts)
        return _rebuild, (type(self), *fields)


def _rebuild(
    kind: type[StoreError], operation: str, key: str, reason: str, transient: bool, attempts: int
) -> StoreError:
    return kind(operation, key, reason, transient=transient, attempts=attempts)


class NotFound(StoreError):
    """There is no such object."""


class Conflict(StoreError):
    """The object is not the one that the caller had read."""


def is_key(key: str) -> bool:
    """Whether ``check_key`` takes it."""
    odd = any(ord(s) < 32 or s in "\\%\x7f" or "\ud800" <= s <= "\udfff" for s in key)
    parts = key.split("/")
    return not (odd or len(key.encode()) > 900 or any(not p or p.startswith(".") for p in parts))


def check_key(operation: str, key: str) -> None:
    """Refuse a key that could leave the store's folder, or that two stores would read differently.

    Raises:
        StoreError: an empty part, one that begins with a dot, a control character, a backslash or
            a percent sign, or more than 900 bytes.
    """
    if not is_key(key):
        raise StoreError(
            operation,
            repr(key),
            "not a key; write a/b/c: relative, no empty part, none that begins with a dot, and "
            "neither %, backslash nor control characters",
        )


def truncated(name: str, size: int, offset: int, end: int) -> StoreError:
    """An object that ends before the bytes that were asked for."""
    reason = f"holds {size} bytes, but bytes {offset} to {end} were asked for; it is truncated"
    return StoreError("read", name, reason)


class Store(Protocol):
    """What every store gives. Keys are relative paths with ``/``; see ``check_key``.

    A prefix names a folder: ``""`` is everything, ``a/b`` holds ``a/b/c`` and not ``a/bc``. Every
    call ends: a store tries again what may pass, within a deadline, and then raises StoreError.
    Calls may come from several threads.
    """

    url: str

    def put(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Write an object from a stream, replacing an older one when it is complete.

        No chunk is copied; each must stay as it is until the call returns.

        Args:
            key: of the object.
            chunks: its bytes; iterated once.
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless it exists; of several writers one wins. Returns whether this call did.

        Where the reply to a write is lost, the object is read back: True if it holds ``data``.
        """

    def put_if_match(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object that has this etag (None: that is absent); returns the new etag.

        Raises:
            Conflict: the object is another one by now.
        """

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The whole object and its etag. Raises NotFound."""

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill writable byte buffers, one after the other, from consecutive bytes of an object.

        One request, straight into place. Raises NotFound, and StoreError if the object is shorter;
        what the buffers hold then is undefined.
        """

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Complete objects under a prefix, sorted by key."""

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders directly under a prefix, sorted; what they hold is not listed."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is absent is no error."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object under a prefix, and what interrupted writers left there."""

    def unfinished(self, prefix: str = "") -> Sequence[Unfinished]:
        """What interrupted writers, or busy ones, have written under a prefix, oldest first."""

    def remove_unfinished(self, prefix: str = "", older_than_seconds: float = 86400.0) -> int:
        """Remove of that what was begun so long ago; returns how many there were."""

    def check_writable(self) -> None:
        """Write, read, list and remove a small object, within seconds. Raises StoreError."""
