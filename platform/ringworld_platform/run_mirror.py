"""A run's logs of a store, kept up to date in a folder: only what is new is fetched."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from ringworld_platform.run_parts import Part, find_parts, standing
from ringworld_workers.store.base import Store


class RunMirror:
    """One run's logs."""

    def __init__(self, store: Store, run_id: str, folder: Path) -> None:
        """Take a run; nothing is fetched yet.

        Args:
            store: of the job.
            run_id: the run.
            folder: for its logs, of which nobody else writes.
        """
        self._store, self._run_id, self._folder = store, run_id, folder
        self._have: dict[str, list[Part]] = {}

    def refresh(self) -> None:
        """Fetch what the store has by now.

        Raises:
            StoreError: the store failed.
            OSError: the folder cannot be written.
        """
        logs: dict[str, list[Part]] = {}
        for part in standing(find_parts(self._store, self._run_id)):
            logs.setdefault(part.name, []).append(part)
        for name, parts in logs.items():
            have = self._have.get(name, [])
            # Of a log whose writer was overtaken, all that follows is other than it was.
            pairs = zip(have, parts, strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if kept < max(len(have), len(parts)):
                self._put(name, parts[:kept], parts[kept:])
            self._have[name] = parts

    def _put(self, name: str, kept: list[Part], new: list[Part]) -> None:
        path = self._folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("r+b") as file:
            file.truncate(kept[-1].offset + kept[-1].size if kept else 0)
            for part in new:
                # A later piece may begin before the end of an earlier one, and prevails.
                file.seek(part.offset)
                file.truncate()
                file.write(self._store.get(f"{self._run_id}/{part.key}"))
