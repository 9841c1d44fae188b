"""Objects by key: what checkpoints and run state need of a store, and the store on a file system.

No torch here: the platform uses stores too. An object appears whole or not at all, and whoever has
been told that it is written will find it after a crash.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Chunk = bytes | bytearray | memoryview

_TEMPORARY = ".tmp-"
_LOCK = ".lock-"
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR, errno.EBUSY}
_REMEDIES = {
    errno.ENOSPC: "the disk is full; free space, then retry",
    errno.EDQUOT: "the disk quota is used up; free space, then retry",
    errno.EACCES: "no permission; give this user access to the folder, or choose another store",
    errno.EPERM: "no permission; give this user access to the folder, or choose another store",
    errno.EROFS: "the file system is read-only; choose another store",
    errno.ENOTDIR: "a part of the path is a file; choose another store",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing."""

    key: str
    size: int


class StoreError(RuntimeError):
    """An operation on the store failed."""

    def __init__(self, operation: str, key: str, reason: str, *, transient: bool = False) -> None:
        """Name what failed.

        Args:
            operation: what was tried: put, get, list, ...
            key: on which object, with the store's url where that helps.
            reason: why, and what to do about it.
            transient: whether the same call may succeed if it is tried again.
        """
        hint = " (retrying may help)" if transient else ""
        super().__init__(f"{operation} {key}: {reason}{hint}")
        self.operation, self.key, self.reason, self.transient = operation, key, reason, transient

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling: Ray carries errors between processes."""
        return _rebuild, (type(self), self.operation, self.key, self.reason, self.transient)


def _rebuild(
    kind: type[StoreError], operation: str, key: str, reason: str, transient: bool
) -> StoreError:
    return kind(operation, key, reason, transient=transient)


class NotFound(StoreError):
    """There is no such object."""


class Conflict(StoreError):
    """The object is not the one that the caller had read."""


class Store(Protocol):
    """What every store gives. Keys are relative paths with ``/``; no part begins with a dot.

    A prefix names a folder: ``""`` is everything, ``a/b`` holds ``a/b/c`` and not ``a/bc``.
    """

    url: str

    def put(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Write an object from a stream, replacing an older one when it is complete."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless it exists; of several writers one wins. Returns whether this call did."""

    def put_if_match(self, key: str, data: bytes, etag: str | None) -> str:
        """Replace the object that has this etag (None: that is absent); returns the new etag.

        Raises:
            Conflict: the object is another one by now.
        """

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The whole object and its etag. Raises NotFound."""

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly these bytes. Raises NotFound, and StoreError if the object is shorter."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Complete objects under a prefix, sorted by key."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is absent is no error."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object under a prefix, and what interrupted writers left there."""

    def remove_unfinished(self, prefix: str = "", older_than_seconds: float = 3600.0) -> int:
        """Remove what interrupted writers left; returns how many leftovers there were."""

    def check_writable(self) -> None:
        """Write, read and remove a small object. Raises StoreError."""


def open_store(url: str) -> Store:
    """The store behind a url: ``file:///absolute/folder``, or relative to the working directory.

    Raises:
        StoreError: unknown scheme, or no path.
    """
    scheme, separator, path = url.partition("://")
    if not separator:
        raise StoreError("open", url, "not a store url; write file:// and the folder's path")
    if scheme != "file":
        raise StoreError("open", url, f"no store for {scheme}:// in this version; use file://")
    if not path:
        raise StoreError("open", url, "no folder is named; write file:///path/to/folder")
    return FileStore(Path(path))


class FileStore:
    """Objects as files under a folder, on any POSIX file system. Implements ``Store``."""

    def __init__(self, root: Path) -> None:
        """Name the folder; it is created by the first write."""
        self.root = root.absolute()
        self.url = f"file://{self.root}"

    def put(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Stream into a hidden file beside the target, sync it, then rename it."""
        path = self._path("put", key)
        with self._errors("put", key), self._temporary(path, chunks) as temporary:
            os.replace(temporary, path)
            _sync_folder(path.parent)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """A hard link is made or refused in one step."""
        path = self._path("put_if_absent", key)
        with self._errors("put_if_absent", key), self._temporary(path, [data]) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
            return True

    def put_if_match(self, key: str, data: bytes, etag: str | None) -> str:
        """Compare and replace while holding the object's lock file."""
        operation = "put_if_match"
        path = self._path(operation, key)
        if etag is None:
            if not self.put_if_absent(key, data):
                raise Conflict(operation, key, "it exists already; read it and decide again")
            return _etag(data)
        with self._errors(operation, key), _locked(path):
            try:
                found = _etag(path.read_bytes())
            except FileNotFoundError:
                found = None
            if found != etag:
                raise Conflict(
                    operation, key, f"its etag is {found}, not {etag}; read it and decide again"
                )
            with self._temporary(path, [data]) as temporary:
                os.replace(temporary, path)
                _sync_folder(path.parent)
        return _etag(data)

    def get(self, key: str) -> bytes:
        """The whole object."""
        path = self._path("get", key)
        with self._errors("get", key):
            return path.read_bytes()

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The whole object and the digest of its bytes."""
        data = self.get(key)
        return data, _etag(data)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly these bytes."""
        path = self._path("read_range", key)
        with self._errors("read_range", key), path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
            if len(data) != length:
                raise StoreError(
                    "read_range",
                    key,
                    f"holds {os.fstat(file.fileno()).st_size} bytes, but bytes {offset} to "
                    f"{offset + length} were asked for; it is truncated",
                )
        return data

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Complete objects: hidden files are not."""
        folder = self._folder("list", prefix)
        found = []
        with self._errors("list", prefix):
            for path in _walk(folder):
                if path.name.startswith("."):
                    continue
                try:
                    size = path.stat().st_size
                except FileNotFoundError:  # removed since the folder was read
                    continue
                found.append(ObjectInfo(path.relative_to(self.root).as_posix(), size))
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        """Remove an object, and the folders that it leaves empty."""
        path = self._path("delete", key)
        with self._errors("delete", key):
            path.unlink(missing_ok=True)
            (path.parent / f"{_LOCK}{path.name}").unlink(missing_ok=True)
            self._remove_empty(path.parent)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every file under the folder, hidden ones too."""
        folder = self._folder("delete_prefix", prefix)
        with self._errors("delete_prefix", prefix):
            for path in list(_walk(folder)):
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)

    def remove_unfinished(self, prefix: str = "", older_than_seconds: float = 3600.0) -> int:
        """Remove hidden files that were last written so long ago."""
        folder = self._folder("remove_unfinished", prefix)
        latest = time.time() - older_than_seconds
        removed = 0
        with self._errors("remove_unfinished", prefix):
            for path in list(_walk(folder)):
                if not path.name.startswith(_TEMPORARY):
                    continue
                try:
                    if path.stat().st_mtime > latest:
                        continue
                    path.unlink()
                except FileNotFoundError:
                    continue
                removed += 1
                self._remove_empty(path.parent)
        return removed

    def check_writable(self) -> None:
        """Write, read and remove a small object."""
        key, data = f"write-test-{uuid.uuid4().hex}", uuid.uuid4().bytes
        self.put(key, [data])
        found = self.get(key)
        self.delete(key)
        if found != data:
            raise StoreError("check_writable", self.url, "a small object came back changed")

    def _path(self, operation: str, key: str) -> Path:
        parts = key.split("/")
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise StoreError(
                operation,
                key,
                "not a key; write a/b/c: relative, no empty part and none that begins with a dot",
            )
        return self.root.joinpath(*parts)

    def _folder(self, operation: str, prefix: str) -> Path:
        return self._path(operation, prefix.rstrip("/")) if prefix else self.root

    @contextmanager
    def _errors(self, operation: str, key: str) -> Iterator[None]:
        """Say what the operating system refused in the store's terms."""
        name = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(operation, name, "there is no such object") from error
        except OSError as error:
            number = error.errno or 0
            reason = _REMEDIES.get(number, error.strerror or str(error))
            raise StoreError(operation, name, reason, transient=number in _TRANSIENT) from error

    @contextmanager
    def _temporary(self, path: Path, chunks: Iterable[Chunk]) -> Iterator[Path]:
        """A complete, synced, hidden file beside ``path``; gone afterwards."""
        temporary = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}"
        descriptor = _create(temporary)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for chunk in chunks:
                    _write_all(file.write, memoryview(chunk).cast("B"))
                os.fsync(descriptor)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.root and self.root in folder.parents:
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                return
            folder = folder.parent


def _create(path: Path) -> int:
    """Open a new file for writing, with its folders; a clean-up may take those away meanwhile."""
    for attempt in range(5):
        try:
            _make_folder(path.parent)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            if attempt == 4:
                raise
    raise AssertionError("unreachable")


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; each survives a power cut as the files in it do."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    while data:
        written = write(data)
        data = data[written or 0 :]


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
        for name in names:
            yield Path(parent, name)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file of one object; the system frees it if this process dies."""
    lock = path.parent / f"{_LOCK}{path.name}"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                current = False
            if current:  # else the object was deleted, lock file and all, while this call waited
                yield
                return
