"""Objects as files under a folder: the store on any POSIX file system."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ringworld_workers.store.base import (
    Chunk,
    Conflict,
    NotFound,
    ObjectInfo,
    StoreError,
    Unfinished,
    check_key,
)

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
        data = bytearray(length)
        self.read_into(key, offset, [memoryview(data)])
        return bytes(data)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers from the file."""
        operation = "read"
        path = self._path(operation, key)
        end = offset + sum(len(buffer) for buffer in buffers)
        with self._errors(operation, key), path.open("rb", buffering=0) as file:
            file.seek(offset)
            for buffer in buffers:
                rest = buffer
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        size = os.fstat(file.fileno()).st_size
                        raise StoreError(
                            operation,
                            key,
                            f"holds {size} bytes, but bytes {offset} to {end} were asked for; it "
                            "is truncated",
                        )
                    rest = rest[count:]

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Complete objects: hidden files are not."""
        folder = self._folder("list", prefix)
        found = []
        with self._errors("list", prefix):
            for path in _walk(folder):
                if path.name.startswith("."):
                    continue
                try:
                    about = path.stat()
                except FileNotFoundError:  # removed since the folder was read
                    continue
                key = path.relative_to(self.root).as_posix()
                found.append(ObjectInfo(key, about.st_size, about.st_mtime))
        return sorted(found, key=lambda info: info.key)

    def folders(self, prefix: str = "") -> Sequence[str]:
        """The folder's own folders, hidden ones left out."""
        folder = self._folder("folders", prefix)
        with self._errors("folders", prefix), suppress(FileNotFoundError, NotADirectoryError):
            places = [place for place in folder.iterdir() if not place.name.startswith(".")]
            return sorted(place.name for place in places if place.is_dir())
        return []

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

    def unfinished(self, prefix: str = "") -> Sequence[Unfinished]:
        """Hidden files; their names do not tell of which object they are, only its folder."""
        found = []
        with self._errors("unfinished", prefix):
            for path in list(_walk(self._folder("unfinished", prefix))):
                if path.name.startswith(_TEMPORARY):
                    with suppress(FileNotFoundError):
                        began = path.stat().st_mtime
                        place = path.relative_to(self.root).as_posix()
                        found.append(Unfinished(path.parent.name, began, place))
        return sorted(found, key=lambda left: left.started)

    def remove_unfinished(self, prefix: str = "", older_than_seconds: float = 86400.0) -> int:
        """Remove hidden files that were last written so long ago."""
        latest = time.time() - older_than_seconds
        removed = 0
        for left in self.unfinished(prefix):
            if left.started > latest:
                break
            with self._errors("remove_unfinished", prefix):
                path = self.root / left.handle
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)
            removed += 1
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
        check_key(operation, key)
        return self.root.joinpath(*key.split("/"))

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
