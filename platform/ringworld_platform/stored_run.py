"""The record of a run in its S3 store: who has the run in hand, wherever, and how far it has come.

For a run on S3 this record decides, by compare-and-set, which controller may run it; the one in the
run's folder is that controller's own, and is lost with its machine. Each taking of the run counts
``epoch`` up: of two records, the one of the higher epoch is of the later controller.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from ringworld_platform.errors import PlatformError, RunConflictError, UnknownRunError
from ringworld_platform.rank_logs import LOGS_FOLDER
from ringworld_platform.run_claims import CLAIM_FILE
from ringworld_platform.run_parts import pull
from ringworld_platform.run_records import CHECKPOINTS_FOLDER, SPEC_FILE, STATE_FILE
from ringworld_platform.run_state import JobRecord, Owner
from ringworld_workers.checkpoint.fence import WRITER
from ringworld_workers.store.base import Conflict, NotFound, Store, StoreError
from ringworld_workers.store.opening import open_store
from ringworld_workers.store.retry import HASTE

_MAX_RACES = 20


class StoredRun:
    """One run's part of its store."""

    def __init__(self, url: str, store: Store | None = None) -> None:
        """Take a run; nothing is asked yet.

        Args:
            url: the run's own, ``s3://BUCKET/PREFIX/RUN``.
            store: ``s3://BUCKET/PREFIX``, where it is open already.
        """
        self.url = url.rstrip("/")
        above, _, self.run_id = self.url.rpartition("/")
        self.store: Store = store or open_store(above, HASTE)

    def key(self, name: str) -> str:
        """Of an object of the run, in the store."""
        return f"{self.run_id}/{name}"

    def read(self) -> tuple[JobRecord, str] | None:
        """The record and its etag; None where there is none.

        Raises:
            PlatformError: what is there is no run's record.
            StoreError: the store failed.
        """
        try:
            data, etag = self.store.get_with_etag(self.key(STATE_FILE))
        except NotFound:
            return None
        try:
            return JobRecord.model_validate_json(data), etag
        except ValidationError as error:
            raise PlatformError(f"{self.url}/{STATE_FILE} is not a run's state: {error}") from error

    def write(self, record: JobRecord, etag: str | None) -> str:
        """Replace the record that has this etag (None: there is none); returns the new etag.

        Raises:
            Conflict: somebody else has written it since.
            StoreError: the store failed.
        """
        data = record.model_dump_json(indent=1).encode()
        return self.store.put_if_match(self.key(STATE_FILE), data, etag)

    def take(self, record: JobRecord, owner: Owner) -> tuple[JobRecord, str]:
        """Make a controller the run's owner.

        Args:
            record: the one of the run's folder, not older than the one in the store: ``refreshed``.
            owner: the controller.

        Returns:
            The record as it is in the store now, and its etag.

        Raises:
            RunConflictError: another controller that may be alive has the run; or the record is
                older than the one in the store.
            PlatformError: the store failed.
        """
        with plain_errors(self.url):
            for _ in range(_MAX_RACES):
                found = self.read()
                if found is not None:
                    self._refuse(found[0], record, owner)
                epoch = found[0].epoch if found else 0
                update = {"owner": owner, "epoch": epoch + 1, "store": self.url, "fetched": False}
                taken = record.model_copy(update=update, deep=True)
                try:
                    return taken, self.write(taken, found[1] if found else None)
                except Conflict:
                    continue
        raise RunConflictError(f"{self.url}: lost {_MAX_RACES} races to take it; try again")

    def refreshed(self, record: JobRecord) -> JobRecord:
        """The newest record of the run: this one, or the store's, whose logs are then fetched.

        Args:
            record: the one in the run's folder.

        Raises:
            RunConflictError: the store holds another run of that name.
            PlatformError: the store failed, or the folder cannot be written.
        """
        with plain_errors(self.url):
            found = self.read()
            if found is None:
                return record
            self._refuse_stranger(found[0], record)
            ours = found[0].epoch == record.epoch and not record.fetched
            if found[0].epoch < record.epoch or ours:
                return record
            return self._fetched(found[0], Path(record.run_folder))

    def restore(self, folder: Path) -> JobRecord:
        """Make the run's folder from what the store holds, where there is none yet.

        Raises:
            UnknownRunError: the store has no record of it.
            PlatformError: the store failed, or the folder cannot be written.
        """
        with plain_errors(self.url):
            found = self.read()
            if found is None:
                raise UnknownRunError(
                    f"{self.url} holds no run's {STATE_FILE}; `ringworld list --store` shows the "
                    "runs of a store"
                )
            return self._fetched(found[0], folder)

    def last_attempt(self) -> int:
        """The last attempt that has written checkpoints; 0 where none has.

        The record may lag behind it, and a gang of the same attempt would be refused.
        """
        with plain_errors(self.url):
            try:
                written = json.loads(self.store.get(self.key(f"{CHECKPOINTS_FOLDER}/{WRITER}")))
                return int(written["attempt"])
            except (NotFound, ValueError, KeyError, TypeError):
                return 0  # a damaged one is said where it is to be written
        return 0

    def _fetched(self, record: JobRecord, folder: Path) -> JobRecord:
        """Fetch the logs; returns the record as the folder's own."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / LOGS_FOLDER).mkdir(exist_ok=True)
            if not (folder / SPEC_FILE).exists():
                scratch = folder / f"{SPEC_FILE}.tmp"
                scratch.write_bytes(self.store.get(self.key(SPEC_FILE)))
                scratch.replace(folder / SPEC_FILE)
            # The logs of a long run are many objects: not in haste.
            pull(open_store(self.store.url), self.run_id, folder)
        except OSError as error:
            raise PlatformError(
                f"cannot write the run folder {folder}: {error.strerror or error}"
            ) from error
        update = {"run_folder": str(folder), "store": self.url, "moved_to": None, "fetched": True}
        return record.model_copy(update=update, deep=True)

    def _refuse(self, found: JobRecord, record: JobRecord, owner: Owner) -> None:
        self._refuse_stranger(found, record)
        theirs = found.owner
        if found.epoch > record.epoch:
            raise RunConflictError(f"{self.url} was taken by {theirs} just now; try again")
        if theirs is None or theirs.controller == owner.controller or found.terminal:
            return
        if theirs.alive(owner.beat):
            raise RunConflictError(
                f"{found.run_id} is run by another controller ({theirs}); stop it there first"
            )

    def _refuse_stranger(self, found: JobRecord, record: JobRecord) -> None:
        if found.uid != record.uid:
            raise RunConflictError(
                f"{self.url} is another run of this name (uid {found.uid}) than the one in "
                f"{record.run_folder} (uid {record.uid}); remove one of the two"
            )


def runs_in(store_url: str, job: str | None = None, most: int | None = None) -> list[StoredRun]:
    """The runs of a store, by the number behind their name.

    Args:
        store_url: such as ``s3://BUCKET/PREFIX``.
        job: only those of this job.
        most: only so many, the last ones.

    Raises:
        PlatformError: the store failed.
    """
    numbered = re.compile(rf"{re.escape(job)}-(\d+)" if job else r".*-(\d+)")
    with plain_errors(store_url):
        store = open_store(store_url, HASTE)
        matches = [numbered.fullmatch(name) for name in store.folders()]
    found = sorted((int(match[1]), match[0]) for match in matches if match)
    last = found if most is None else found[-most:]
    return [StoredRun(f"{store.url}/{name}", store) for _, name in last]


def claimed_digest(run: StoredRun) -> tuple[str, float]:
    """Digest of the spec of a run whose id was taken, and when: it may have no record yet."""
    try:
        claim = json.loads(run.store.get(run.key(CLAIM_FILE)))
        return str(claim["spec_digest"]), float(claim["created"])
    except (NotFound, ValueError, KeyError, TypeError):
        return "", 0.0


@contextlib.contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """A store's refusal as an error that commands print as it is."""
    try:
        yield
    except StoreError as error:
        raise PlatformError(f"{url}: {error}") from error
