"""Where the files of a prepared dataset lie: in a folder, or behind a URL."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs

from ringworld_jobs.files import SHARD_SCHEMES
from ringworld_workers.data.files import DataError
from ringworld_workers.data.shard_cache import ShardCache
from ringworld_workers.data.shard_format import META_FILE, ShardEntry

RETRY_SECONDS = 120.0
"""How long a read is tried again without a byte coming, before the stage fails."""
CHUNK_BYTES = 16 << 20
"""One request's part of a shard: what has to be read again after an error."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 10.0
_FINAL = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "NO_SUCH_BUCKET", "SIGNATURE_DOES_NOT_MATCH")
"""Errors of S3 that trying again does not cure."""

Result = TypeVar("Result")


class Shards(Protocol):
    """The files of one dataset."""

    def where(self, file: str) -> str:
        """What messages call a file."""

    def read(self, file: str) -> bytes:
        """A small file.

        Raises:
            DataError: it is not there, or cannot be read.
        """

    def open(self, entry: ShardEntry) -> pa.MemoryMappedFile:
        """A shard, mapped into memory.

        Raises:
            DataError: it is missing, damaged, or not as long as when it was written.
        """

    def admit(self, entries: list[ShardEntry]) -> None:
        """Learn which shards will be opened.

        Raises:
            DataError: there is no room for them.
        """

    def prefetch(self, blocks: Sequence[Sequence[ShardEntry]]) -> None:
        """Learn which shards are needed next, block by block."""


def open_shards(place: str, cache: ShardCache | None) -> Shards:
    """The files of the dataset at a folder or URL; nothing is read yet.

    Raises:
        DataError: a URL of an unknown kind, or one without a cache.
    """
    scheme, separator, _ = place.partition("://")
    if not separator:
        return LocalShards(Path(place))
    if scheme not in SHARD_SCHEMES or cache is None:
        known = ", ".join(f"{scheme}://" for scheme in SHARD_SCHEMES)
        raise DataError(f"{place} cannot be read here; give a folder, or in a job {known}")
    return RemoteShards(place, cache)


class LocalShards:
    """A dataset in a folder."""

    def __init__(self, folder: Path) -> None:
        """Look at a folder; nothing is read."""
        self._folder = folder

    def where(self, file: str) -> str:
        """See ``Shards``."""
        return str(self._folder / file)

    def read(self, file: str) -> bytes:
        """See ``Shards``."""
        try:
            return (self._folder / file).read_bytes()
        except FileNotFoundError:
            raise _missing(str(self._folder), file) from None
        except OSError as error:
            raise DataError(f"cannot read {self.where(file)}: {error.strerror}") from error

    def open(self, entry: ShardEntry) -> pa.MemoryMappedFile:
        """See ``Shards``; the length is compared, the digest is not (``data check`` does)."""
        path = self._folder / entry["file"]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise _missing(str(self._folder), entry["file"]) from None
        if size != entry["bytes"]:
            raise _wrong_length(str(path), size, entry)
        return pa.memory_map(str(path), "r")

    def admit(self, entries: list[ShardEntry]) -> None:
        """All are here already."""

    def prefetch(self, blocks: Sequence[Sequence[ShardEntry]]) -> None:
        """All are here already."""


class RemoteShards:
    """A dataset behind a URL: ``s3://bucket/folder``.

    Credentials, region and endpoint come from where AWS's tools take them: the environment, the
    configuration files, the machine's role. Region, scheme and ``endpoint_override`` may be given
    as a query as well: ``s3://bucket/folder?endpoint_override=minio:9000&scheme=http``.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        """Name a dataset; nothing is read."""
        parts = urlsplit(url)
        self._query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self._url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._path = f"{parts.netloc}{parts.path.rstrip('/')}"
        self._cache = cache
        self._blocks: list[list[str]] = []

    @cached_property
    def _files(self) -> fs.FileSystem:
        options = {
            key: self._query[key]
            for key in ("region", "scheme", "endpoint_override")
            if key in self._query
        }
        # One try each: the tries are counted, and bounded in time, below.
        once = fs.AwsStandardS3RetryStrategy(max_attempts=1)
        return fs.S3FileSystem(
            retry_strategy=once, connect_timeout=10.0, request_timeout=30.0, **options
        )

    def where(self, file: str) -> str:
        """See ``Shards``."""
        return f"{self._url}/{file}"

    def read(self, file: str) -> bytes:
        """See ``Shards``."""

        def whole() -> bytes:
            with self._files.open_input_file(f"{self._path}/{file}") as source:
                content: bytes = source.read()
                if len(content) != source.size():
                    raise OSError(f"{len(content)} of {source.size()} bytes came")
                return content

        return self._retry(file, whole)

    def open(self, entry: ShardEntry) -> pa.MemoryMappedFile:
        """See ``Shards``; it is fetched into the cache, and its digest compared."""
        return self._cache.open(entry, partial(self._fetch, entry))

    def admit(self, entries: list[ShardEntry]) -> None:
        """See ``Shards``."""
        self._cache.admit(entries)

    def prefetch(self, blocks: Sequence[Sequence[ShardEntry]]) -> None:
        """See ``Shards``; the block after the next only where the cache has room for both."""
        blocks = blocks if self._cache.roomy else blocks[:1]
        for block in blocks:
            names = [entry["sha256"] for entry in block]
            if names in self._blocks:
                continue
            self._blocks = [*self._blocks[-1:], names]
            for entry in block:
                self._cache.prefetch(partial(self.open, entry))

    def _fetch(self, entry: ShardEntry, target: BinaryIO) -> None:
        file, tries = entry["file"], 2
        for left in reversed(range(tries)):
            digest = hashlib.sha256()
            target.seek(0)
            source = self._retry(file, lambda: self._files.open_input_file(f"{self._path}/{file}"))
            with source:
                if source.size() != entry["bytes"]:
                    raise _wrong_length(self.where(file), source.size(), entry)
                for start in range(0, entry["bytes"], CHUNK_BYTES):
                    size = min(CHUNK_BYTES, entry["bytes"] - start)
                    chunk = self._retry(file, partial(_read_at, source, start, size))
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() == entry["sha256"]:
                return
            if not left:
                raise DataError(
                    f"{self.where(file)} is damaged: its sha256 is {digest.hexdigest()}, meta.json "
                    f"says {entry['sha256']} (read {tries} times); upload the dataset again"
                )

    def _retry(self, file: str, read: Callable[[], Result]) -> Result:
        """Try until it works, or for ``RETRY_SECONDS``.

        Raises:
            DataError: names the object, and the last error.
        """
        started, pause, tries = time.monotonic(), _FIRST_PAUSE_SECONDS, 0
        while True:
            tries += 1
            try:
                return read()
            except FileNotFoundError:
                raise _missing(self._url, file) from None
            except OSError as error:
                spent = time.monotonic() - started
                hopeless = any(code in str(error) for code in _FINAL)
                if hopeless or spent + pause > RETRY_SECONDS:
                    raise DataError(
                        f"cannot read {self.where(file)} (tried {tries} times in {spent:.0f} s): "
                        f"{error}; check the URL, the credentials and the way there"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _read_at(source: pa.NativeFile, start: int, size: int) -> bytes:
    chunk: bytes = source.read_at(size, start)
    if len(chunk) != size:
        raise OSError(f"{len(chunk)} of {size} bytes came from byte {start} on")
    return chunk


def _missing(place: str, file: str) -> DataError:
    if file == META_FILE:
        return DataError(
            f"{place} holds no {META_FILE}; point it at a dataset's folder as "
            f"`ringworld data build` wrote it"
        )
    return DataError(f"{place}/{file} is missing; build the data again")


def _wrong_length(where: str, size: int, entry: ShardEntry) -> DataError:
    return DataError(
        f"{where} has {size} bytes, {entry['bytes']} were written; build the data again"
    )
