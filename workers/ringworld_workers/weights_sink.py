"""Files of weights as objects of a store, so that an export can go to S3. No torch here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ringworld_model.hf_config import WeightsError
from ringworld_model.hf_sink import Chunk, FolderSink, Sink
from ringworld_workers.store.base import Store, StoreError
from ringworld_workers.store.opening import open_store

_COPY_BYTES = 8 * 1024 * 1024


def open_sink(place: str) -> Sink:
    """Where weights are written to: a folder, or a url.

    Args:
        place: a path, ``file://...`` or ``s3://BUCKET/PREFIX``.

    Raises:
        StoreError: a url of no known kind.
    """
    scheme, separator, path = place.partition("://")
    if not separator:
        return FolderSink(Path(place).expanduser())
    return FolderSink(path) if scheme == "file" else StoreSink(open_store(place))


class StoreSink:
    """Objects under a prefix, streamed. Implements ``Sink``.

    A bucket cannot rename, so the files appear one by one; the model's config.json is the last.
    """

    def __init__(self, store: Store) -> None:
        """Write to the root of ``store``, which must hold nothing."""
        self._store = store
        self._files: dict[str, int] = {}

    def open(self, needed_bytes: int) -> None:
        """Refuse a prefix that holds anything; a bucket has no end that could be asked for."""
        held = self._store.list()
        if held:
            raise WeightsError(
                f"{self._store.url} is not empty: it holds {held[0].key}; give a new prefix, or "
                "empty that one"
            )

    def write(self, name: str, chunks: Iterable[Chunk]) -> None:
        """Stream one object."""
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                # Copies, because the store keeps what it has not sent yet, and a view would keep
                # the whole tensor.
                for begin in range(0, len(chunk), _COPY_BYTES):
                    yield bytes(chunk[begin : begin + _COPY_BYTES])
                size += len(chunk)
                del chunk  # before the next one is made

        # Known before it is complete: what is half there must go too.
        self._files[name] = 0
        self._store.put(name, counted())
        self._files[name] = size

    def write_folder(self, fill: Callable[[Path], object]) -> None:
        """Have small files written to a folder of this machine, and store them."""
        with tempfile.TemporaryDirectory(prefix="ringworld-export-") as scratch:
            folder = Path(scratch)
            fill(folder)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                self.write(path.relative_to(folder).as_posix(), [path.read_bytes()])

    def commit(self) -> dict[str, int]:
        """What was written; the last file was the model's config.json."""
        return dict(sorted(self._files.items()))

    def abort(self) -> None:
        """Remove what was written, unless the store is away."""
        with suppress(StoreError):
            for name in self._files:
                self._store.delete(name)
