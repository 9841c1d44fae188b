"""Where the states of the runs of one folder are read and written: one object each.

Whoever may write (controllers, one at a time a run) reads, changes and puts back what it read; a
writer that comes second sees a conflict and starts over from what the first one wrote.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ringworld_platform.errors import PlatformError, RunConflictError, UnknownRunError
from ringworld_platform.run_claims import RunClaims
from ringworld_platform.run_records import STATE_FILE
from ringworld_platform.run_state import JobRecord
from ringworld_platform.seen_files import SeenFiles
from ringworld_workers.store.base import Conflict, StoreError
from ringworld_workers.store.opening import open_store

_MAX_RACES = 50


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as it stands in its folder, and the etag of that."""

    record: JobRecord
    etag: str


class _Seen:
    """A run as its folder said; nobody changes the record."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self._status: dict[str, Any] | None = None

    def status(self) -> dict[str, Any]:
        """As ``JobRecord.to_status``, made once for a run that has ended: most have."""
        if not self.record.terminal:
            return self.record.to_status()
        if self._status is None:
            self._status = self.record.to_status()
        return dict(self._status)


class RunStates:
    """The runs of one folder. It remembers what ``all`` has read: keep it, to ask often."""

    def __init__(self, root: Path) -> None:
        """Take the folder of runs; it need not exist yet.

        Args:
            root: absolute path; each run has a folder in it.
        """
        self.root = root
        self._store = open_store(f"file://{root}")
        self._seen = SeenFiles[_Seen]()

    def create(
        self,
        job: str,
        record: Callable[[str, Path], JobRecord],
        claims: RunClaims | None = None,
    ) -> JobRecord:
        """Store a new run under the next free id: ``job-1``, ``job-2``, ...

        Args:
            job: name of the job.
            record: makes the record from the run id and the run's folder.
            claims: where the id must be free too, and is taken.
        """
        number = len([found for found in self.all() if found.job == job])
        if claims is not None:
            number = max(number, claims.highest(job))
        for _ in range(_MAX_RACES):
            number += 1
            run_id = f"{job}-{number}"
            if (self.root / run_id / STATE_FILE).exists():
                continue
            made = record(run_id, self.root / run_id)
            if claims is not None and not claims.take(made):
                continue
            try:
                with _plain_errors():
                    if self._store.put_if_absent(f"{run_id}/{STATE_FILE}", _encode(made)):
                        return made
            except PlatformError:
                if claims is not None:
                    claims.give_back(run_id)
                raise
            if claims is not None:
                claims.give_back(run_id)
        raise PlatformError(f"no free run id for {job} in {self.root} after {number} tries")

    def get(self, run_id: str) -> JobRecord:
        """The stored state of a run.

        Raises:
            UnknownRunError: there is none.
        """
        self._check_is_here(run_id)
        return self._read(run_id).record

    def update(self, run_id: str, change: Callable[[JobRecord], JobRecord]) -> JobRecord:
        """Change a run's state; ``change`` runs again if somebody else was faster.

        Args:
            run_id: which run.
            change: gives the new record from the stored one; it may raise to leave it as it is.

        Returns:
            The record as stored.
        """
        return self.renew(run_id, change, None).record

    def renew(
        self, run_id: str, change: Callable[[JobRecord], JobRecord], last: Stored | None
    ) -> Stored:
        """As ``update``, for who writes often: what it has put there last is not read again.

        Args:
            run_id: which run.
            change: as of ``update``; must leave the record as it is that it is given.
            last: what this gave the last time; another's change since is noticed all the same.
        """
        for _ in range(_MAX_RACES):
            self._check_is_here(run_id)
            stored = last or self._read(run_id)
            last = None
            changed = change(stored.record)
            changed.updated = time.time()
            try:
                with _plain_errors():
                    etag = self._store.put_if_match(
                        f"{run_id}/{STATE_FILE}", _encode(changed), stored.etag
                    )
            except Conflict:
                continue
            return Stored(changed, etag)
        raise RunConflictError(f"{run_id}: lost {_MAX_RACES} races to write its state; try again")

    def keep(self, record: JobRecord) -> JobRecord:
        """Put a run here that was made elsewhere; the one that is there of its id stays.

        Returns:
            What is there now.
        """
        with _plain_errors():
            self._store.put_if_absent(f"{record.run_id}/{STATE_FILE}", _encode(record))
        return self.get(record.run_id)

    def forget(self, run_id: str) -> None:
        """Remove a run that never came to be, folder and all."""
        with _plain_errors():
            self._store.delete_prefix(run_id)

    def all(self, without: Callable[[str], bool] = lambda run_id: False) -> list[JobRecord]:
        """Every run, oldest first; folders without a readable state are passed over.

        Args:
            without: whether a run of this id is left out, its folder unread.
        """
        # Copies, because the next one to ask is given the same.
        found = [seen.record.model_copy() for seen in self._scan(without)]
        return sorted(found, key=lambda record: (record.submitted, record.run_id))

    def statuses(
        self, known: Callable[[str], dict[str, Any] | None] = lambda run_id: None
    ) -> list[dict[str, Any]]:
        """What ``status --json`` prints of every run, oldest first.

        Args:
            known: gives it for the id of a run that the caller knows better than its folder does.
        """
        better: list[dict[str, Any]] = []

        def is_known(run_id: str) -> bool:
            status = known(run_id)
            if status is not None:
                better.append(status)
            return status is not None

        found = better + [seen.status() for seen in self._scan(is_known)]
        return sorted(found, key=lambda status: (status["submitted"], status["run_id"]))

    def find(self, name: str) -> JobRecord:
        """The run of that id, else the newest run of the job of that name.

        Raises:
            UnknownRunError: neither exists; the message names what does.
        """
        # Joined to the root, an absolute path would be taken for a run's id.
        if Path(name).name == name and (self.root / name / STATE_FILE).is_file():
            return self.get(name)
        records = self.all()
        runs = [record for record in records if record.job == name]
        if not runs:
            known = ", ".join(record.run_id for record in records[-5:]) or "none"
            raise UnknownRunError(f"no run or job {name!r} in {self.root}; the latest are: {known}")
        return runs[-1]

    def _scan(self, without: Callable[[str], bool]) -> list[_Seen]:
        # The folder, not the store's list: a run's folder holds thousands of objects.
        found = []
        for run_id in os.listdir(self.root) if self.root.is_dir() else ():
            if without(run_id):
                continue
            path, read = f"{self.root}/{run_id}/{STATE_FILE}", partial(self._see, run_id)
            with suppress(PlatformError, OSError):
                found.append(self._seen.get(path, read))
        return found

    def _see(self, run_id: str) -> _Seen:
        return _Seen(self.get(run_id))

    def _check_is_here(self, run_id: str) -> None:
        # Also before a write, which would make its folder anew.
        if not os.path.isfile(f"{self.root}/{run_id}/{STATE_FILE}"):
            raise UnknownRunError(f"no run {run_id!r} in {self.root}")

    def _read(self, run_id: str) -> Stored:
        with _plain_errors():
            data, etag = self._store.get_with_etag(f"{run_id}/{STATE_FILE}")
        try:
            return Stored(JobRecord.model_validate_json(data), etag)
        except ValidationError as error:
            raise PlatformError(
                f"{self.root / run_id / STATE_FILE} is not a run's state: {error}"
            ) from error


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A store's refusal (a full disk, no permission) as an error that commands print as it is."""
    try:
        yield
    except Conflict:
        raise
    except StoreError as error:
        raise PlatformError(str(error)) from error


def _encode(record: JobRecord) -> bytes:
    return record.model_dump_json(indent=1).encode()
