"""Which folders hold runs: a list in a file, which outlives controllers and clusters.

A controller that starts on a new cluster has no other way to learn of the runs that the last one
left. For clusters that stay, the list lies beside what is known of them, in ``~/.ringworld``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ringworld_platform.errors import PlatformError
from ringworld_workers.store.base import Conflict, NotFound, StoreError
from ringworld_workers.store.file_store import FileStore

log = logging.getLogger(__name__)

USERS_LIST = "~/.ringworld/runs.json"
_MAX_RACES = 50


class RootList:
    """Folders of runs, in the order in which they came to be known. Several processes may add."""

    def __init__(self, path: Path) -> None:
        """Take the file; it need not exist yet."""
        self._store, self._key = FileStore(path.expanduser().parent), path.name

    def all(self) -> list[Path]:
        """The folders; one that is not there now may only be unmounted."""
        try:
            return [Path(root) for root in self._read()[0]]
        except StoreError as error:
            log.warning("folders of earlier runs are not known: %s", error)
            return []

    def add(self, root: Path) -> None:
        """Put a folder on the list, if it is not there.

        Raises:
            PlatformError: the list cannot be written: nobody would find a lost cluster's runs.
        """
        try:
            for _ in range(_MAX_RACES):
                found, etag = self._read()
                if str(root) in found:
                    return
                data = json.dumps({"roots": [*found, str(root)]}, indent=1).encode()
                try:
                    self._store.put_if_match(self._key, data, etag)
                    return
                except Conflict:
                    continue
        except StoreError as error:
            raise PlatformError(f"cannot keep the list of folders of runs: {error}") from error
        raise PlatformError(f"{self._store.url}/{self._key}: lost {_MAX_RACES} races; try again")

    def _read(self) -> tuple[list[str], str | None]:
        try:
            data, etag = self._store.get_with_etag(self._key)
        except NotFound:
            return [], None
        try:
            return [str(root) for root in json.loads(data)["roots"]], etag
        except (ValueError, KeyError, TypeError):
            log.warning("%s/%s is damaged; it begins anew", self._store.url, self._key)
            return [], etag
