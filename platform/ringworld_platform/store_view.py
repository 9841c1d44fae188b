"""Runs as their store on S3 knows them: for a machine that has no folder of theirs."""

from __future__ import annotations

import math
import time
from pathlib import Path

from ringworld_platform.errors import UnknownRunError
from ringworld_platform.run_folder import Page, RunFolder
from ringworld_platform.run_mirror import RunMirror
from ringworld_platform.run_records import SPEC_FILE, Record, read_spec
from ringworld_platform.run_state import JobRecord
from ringworld_platform.stored_run import StoredRun, plain_errors, runs_in
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import HASTE

REFRESH_SECONDS = 5.0
"""For so long, logs that were fetched are new enough."""
# The view has a method called list.
Rows = list[Record]
Records = list[JobRecord]


def split_url(name: str | None, store: str | None) -> tuple[str | None, str | None]:
    """A run's name and its store, where the name may be the run's url in the store.

    Args:
        name: as the user gave it: an id, a job's name or ``s3://BUCKET/PREFIX/RUN``.
        store: as the user gave it.

    Returns:
        The name and the store; no store where neither names one.
    """
    if name is None or "://" not in name:
        return name, store
    above, _, last = name.rstrip("/").rpartition("/")
    return last, above


class StoreView:
    """Reads the runs of a store; changes nothing there. A ``RunView``."""

    def __init__(self, url: str, scratch: Path) -> None:
        """Take the store.

        Args:
            url: such as ``s3://BUCKET/PREFIX``.
            scratch: an empty folder, for the logs that are asked for.
        """
        self._url, self._scratch = url.rstrip("/"), scratch
        self._store = open_store(self._url, HASTE)
        self._mirrors: dict[str, tuple[RunMirror, float]] = {}

    def status(self, name: str) -> Record:
        """See ``RunView``.

        Raises:
            UnknownRunError: no such run or job in the store.
            PlatformError: the store does not answer.
        """
        return self._find(name).to_status()

    def list(self) -> Rows:
        """See ``RunView``."""
        return [record.to_status() for record in self._records()]

    def events(self, name: str, after: int = 0) -> Rows:
        """See ``RunView``."""
        return self._folder(name).events(after)

    def metrics(self, name: str, after: int = 0) -> Page:
        """See ``RunView``."""
        return self._folder(name).metrics(after)

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """See ``RunView``."""
        return self._folder(name).log(rank, after)

    def log_ends(self, name: str) -> dict[int, int]:
        """See ``RunView``."""
        return self._folder(name).log_ends()

    def spec(self, name: str) -> Record:
        """See ``RunView``."""
        folder = self._folder(name).path
        if not (folder / SPEC_FILE).exists():
            with plain_errors(self._url):
                data = self._store.get(f"{folder.name}/{SPEC_FILE}")
            (folder / SPEC_FILE).write_bytes(data)
        return read_spec(folder)

    def run_url(self, name: str) -> str:
        """Url of a run, by its id or by its job's name (its newest run)."""
        return f"{self._url}/{self._find(name).run_id}"

    def _find(self, name: str) -> JobRecord:
        with plain_errors(self._url):
            found = StoredRun(f"{self._url}/{name}", self._store).read()
        if found is not None:
            return found[0]
        ofjob = [record for record in self._records(name) if record.job == name]
        if not ofjob:
            known = ", ".join(record.run_id for record in self._records()[-5:]) or "none"
            raise UnknownRunError(f"no run or job {name!r} in {self._url}; the latest are: {known}")
        return ofjob[-1]

    def _records(self, job: str | None = None) -> Records:
        with plain_errors(self._url):
            found = [run.read() for run in runs_in(self._url, job)]
        records = [record for record, _ in filter(None, found)]
        return sorted(records, key=lambda record: (record.submitted, record.run_id))

    def _folder(self, name: str) -> RunFolder:
        """The run's logs, as they were a few seconds ago at most."""
        run_id = name if name in self._mirrors else self._find(name).run_id
        folder = self._scratch / run_id
        mirror, fetched = self._mirrors.get(run_id, (None, -math.inf))
        if mirror is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not in haste: the logs of a long run are many objects.
            mirror = RunMirror(open_store(self._url), run_id, folder)
        if time.monotonic() - fetched >= REFRESH_SECONDS:
            with plain_errors(self._url):
                mirror.refresh()
            self._mirrors[run_id] = mirror, time.monotonic()
        return RunFolder(folder)
