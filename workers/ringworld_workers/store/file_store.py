"""Objects as files under a folder: the store on any POSIX file system."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ringworld_workers.store.base import (
    Chunk,
    Conflict,
    NotFound,
    ObjectInfo,
    StoreError,
    Unfinished,
    check_key,
    is_key,
    truncated,
)
from ringworld_workers.store.check import check_store
from ringworld_workers.store.posix_files import (
    LOCK,
    TEMPORARY,
    Replay,
    SourceError,
    locked,
    sync_folder,
    temporary_file,
    walk,
)
from ringworld_workers.store.retry import HASTE, Effort, Passing, Patience

Result = TypeVar("Result")

# A disk that does not come back within seconds is broken; a training run must hear of it.
_PATIENCE = Patience(attempts=8)
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR, errno.EBUSY}
_NO_FILE = {errno.EISDIR, errno.ENOTDIR}
_READS = {"get", "read"}
# They make the object's folder first, and whoever empties that at the same moment removes it.
_MAKES = {"put", "put_if_absent"}
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

    def __init__(self, root: Path, *, patience: Patience | None = None) -> None:
        """Name the folder; it is created by the first write.

        Args:
            root: its path.
            patience: how long a call may go on after errors of the file system that may pass.
        """
        self.root = root.absolute()
        self.url = f"file://{self.root}"
        self._patience = patience or _PATIENCE

    def put(self, key: str, chunks: Iterable[Chunk]) -> None:
        """Stream into a hidden file beside the target, sync it, then rename it."""
        path, stream = self._path("put", key), Replay(chunks)

        def write() -> None:
            with temporary_file(path, stream) as temporary:
                os.replace(temporary, path)
                sync_folder(path.parent)

        try:
            self._run(self._effort("put", key), write)
        except SourceError as broken:
            raise broken.error from None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """A hard link is made or refused in one step."""
        return self._put_new(self._effort("put_if_absent", key), key, data)

    def put_if_match(self, key: str, data: bytes, etag: str | None) -> str:
        """Compare and replace while holding the object's lock file."""
        operation = "put_if_match"
        path, effort, wrote = self._path(operation, key), self._effort(operation, key), False
        if etag is None:
            if not self._put_new(effort, key, data):
                raise Conflict(operation, effort.name, "it exists already; read it, decide again")
            return _etag(data)

        def write() -> None:
            nonlocal wrote
            with locked(path, self._patience.reply_seconds):
                try:
                    found = _etag(path.read_bytes())
                except FileNotFoundError:
                    found = None
                if not (wrote and found == _etag(data)):
                    if found != etag:
                        reason = f"its etag is {found}, not {etag}; read it, decide again"
                        raise Conflict(operation, effort.name, reason)
                    with temporary_file(path, [data]) as temporary:
                        wrote = True
                        os.replace(temporary, path)
                sync_folder(path.parent)

        self._run(effort, write)
        return _etag(data)

    def get(self, key: str) -> bytes:
        """The whole object."""
        return self._run(self._effort("get", key), self._path("get", key).read_bytes)

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The whole object and the digest of its bytes."""
        data = self.get(key)
        return data, _etag(data)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers from the file."""
        operation = "read"
        path = self._path(operation, key)
        effort = self._effort(operation, key)
        end = offset + sum(len(buffer) for buffer in buffers)

        def fill() -> None:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                for buffer in buffers:
                    rest = buffer
                    while rest:
                        count = file.readinto(rest)
                        if not count:
                            size = os.fstat(file.fileno()).st_size
                            raise truncated(effort.name, size, offset, end)
                        rest = rest[count:]

        self._run(effort, fill)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Complete objects: hidden files are not. What has an odd name is not listed."""
        folder = self._folder("list", prefix)

        def find() -> Iterator[ObjectInfo]:
            for path in walk(folder):
                key = path.relative_to(self.root).as_posix()
                if is_key(key):
                    with suppress(FileNotFoundError):  # removed since the folder was read
                        about = path.stat()
                        yield ObjectInfo(key, about.st_size, about.st_mtime)

        effort = self._effort("list", prefix)
        return self._run(effort, lambda: sorted(find(), key=lambda info: info.key))

    def folders(self, prefix: str = "") -> Sequence[str]:
        """The folder's own folders, hidden ones left out."""
        folder = self._folder("folders", prefix)

        def find() -> Sequence[str]:
            with suppress(FileNotFoundError, NotADirectoryError):
                places = [place for place in folder.iterdir() if not place.name.startswith(".")]
                return sorted(place.name for place in places if place.is_dir())
            return []

        return self._run(self._effort("folders", prefix), find)

    def delete(self, key: str) -> None:
        """Remove an object, and the folders that it leaves empty."""
        path = self._path("delete", key)

        def remove() -> None:
            with suppress(NotADirectoryError, IsADirectoryError):  # so there is no such object
                path.unlink(missing_ok=True)
                (path.parent / f"{LOCK}{path.name}").unlink(missing_ok=True)
                self._remove_empty(path.parent)

        self._run(self._effort("delete", key), remove)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every file under the folder, hidden ones too."""
        folder = self._folder("delete_prefix", prefix)

        def remove() -> None:
            for path in list(walk(folder)):
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)

        self._run(self._effort("delete_prefix", prefix), remove)

    def unfinished(self, prefix: str = "") -> Sequence[Unfinished]:
        """Hidden files; their names do not tell of which object they are, only its folder."""
        folder = self._folder("unfinished", prefix)

        def find() -> Iterator[Unfinished]:
            for path in walk(folder):
                if path.name.startswith(TEMPORARY):
                    with suppress(FileNotFoundError):
                        place = path.relative_to(self.root).as_posix()
                        yield Unfinished(path.parent.name, path.stat().st_mtime, place)

        effort = self._effort("unfinished", prefix)
        return self._run(effort, lambda: sorted(find(), key=lambda left: left.started))

    def remove_unfinished(self, prefix: str = "", older_than_seconds: float = 86400.0) -> int:
        """Remove hidden files that were last written so long ago."""
        latest = time.time() - older_than_seconds
        old = [left for left in self.unfinished(prefix) if left.started <= latest]

        def remove() -> None:
            for left in old:
                path = self.root / left.handle
                path.unlink(missing_ok=True)
                self._remove_empty(path.parent)

        self._run(self._effort("remove_unfinished", prefix), remove)
        return len(old)

    def check_writable(self) -> None:
        """Try it out, in seconds."""
        check_store(FileStore(self.root, patience=HASTE))

    def _put_new(self, effort: Effort, key: str, data: bytes) -> bool:
        """Whether there was no such object, and this call has made it."""
        path, tried = self._path(effort.operation, key), False

        def write() -> bool:
            nonlocal tried
            with temporary_file(path, [data]) as temporary:
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    if not tried or path.read_bytes() != data:
                        return False  # else an earlier attempt got as far as this
                finally:
                    tried = True
                sync_folder(path.parent)
                return True

        return self._run(effort, write)

    def _path(self, operation: str, key: str) -> Path:
        check_key(operation, key)
        return self.root.joinpath(*key.split("/"))

    def _folder(self, operation: str, prefix: str) -> Path:
        return self._path(operation, prefix.rstrip("/")) if prefix else self.root

    def _effort(self, operation: str, key: str) -> Effort:
        name = f"{self.url}/{key}" if key else self.url
        return Effort(operation, name, self._patience)

    def _run(self, effort: Effort, action: Callable[[], Result]) -> Result:
        """Do it, again if need be, and say what the system refused in the store's terms."""

        def attempt() -> Result:
            try:
                return action()
            except OSError as error:
                number = error.errno or 0
                if number == errno.ENOENT and effort.operation in _MAKES:
                    raise Passing("its folder was removed while it was written") from error
                absent = number in _NO_FILE and effort.operation in _READS
                if absent or number == errno.ENOENT:
                    reason = "there is no such object"
                    raise NotFound(effort.operation, effort.name, reason) from error
                reason = _REMEDIES.get(number, error.strerror or str(error))
                if number in _TRANSIENT:
                    raise Passing(reason) from error
                # Soon again is no use here, but somebody may make room.
                full = number in (errno.ENOSPC, errno.EDQUOT)
                raise StoreError(effort.operation, effort.name, reason, transient=full) from error

        return effort.run(attempt)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.root and self.root in folder.parents:
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already
                return
            folder = folder.parent


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
