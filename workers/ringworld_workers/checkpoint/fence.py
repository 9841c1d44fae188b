"""Who may write a run's checkpoints: the gang that took ``writer.json`` last. No torch here."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import time
from dataclasses import asdict, dataclass, replace

from ringworld_workers.checkpoint.layout import CheckpointError
from ringworld_workers.store.base import Conflict, NotFound, Store, StoreError

log = logging.getLogger(__name__)

WRITER = "writer.json"
_TRIES = 5


class TakenOver(CheckpointError):
    """Another gang writes this run's checkpoints; this one must stop."""


@dataclass(frozen=True)
class WriterRecord:
    """What ``writer.json`` says."""

    run_uid: str
    """Empty: unknown."""
    attempt: int
    stage_index: int
    """A stage's gang follows that of the stage before within one attempt."""
    token: str
    """Unlike for any two gangs; part of the names of the objects that it writes."""
    host: str
    started: float
    """When it was taken, seconds since the epoch."""
    ended: float | None = None
    """When the gang had written all that it ever will; None while it may write."""

    def __str__(self) -> str:
        """In words."""
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started))
        return f"attempt {self.attempt} on {self.host}, since {when}"


def read_writer(store: Store) -> WriterRecord | None:
    """Who writes the run's checkpoints; None where nobody has yet.

    Raises:
        CheckpointError: the record is damaged.
        StoreError: the store failed.
    """
    try:
        return _parse(store.get(WRITER), store)
    except NotFound:
        return None


class Fence:
    """One gang's claim to write. Used on rank 0 alone."""

    def __init__(self, store: Store, *, run_uid: str, attempt: int, stage_index: int) -> None:
        """Claim nothing yet."""
        self._store = store
        self.record = WriterRecord(
            run_uid=run_uid,
            attempt=attempt,
            stage_index=stage_index,
            token=secrets.token_hex(6),
            host=socket.gethostname(),
            started=time.time(),
        )

    def take(self) -> None:
        """Become the one that writes; gangs that wrote before commit nothing from now on.

        Raises:
            TakenOver: a later attempt, or another gang of this one, writes; or the place is
                another run's.
            CheckpointError: the record is damaged.
            StoreError: the store failed.
        """
        for _ in range(_TRIES):
            try:
                data, etag = self._store.get_with_etag(WRITER)
            except NotFound:
                etag = None
            else:
                found = _parse(data, self._store)
                if found.token == self.record.token:
                    return
                self._refuse(found)
            try:
                self._store.put_if_match(WRITER, self._bytes(self.record), etag)
                return
            except Conflict:  # somebody else was faster, or the reply to this very write was lost
                continue
        raise StoreError(
            "take", f"{self._store.url}/{WRITER}", "other writers keep changing it", transient=True
        )

    def check(self) -> None:
        """Make sure that this gang still is the one that writes.

        A record that was removed is written again: with nobody else there, nothing is lost.

        Raises:
            TakenOver: it is not.
            CheckpointError: the record is damaged.
            StoreError: the store failed, so nothing is known.
        """
        found = read_writer(self._store)
        if found is None:
            self.take()
        elif found.token != self.record.token:
            raise TakenOver(
                f"{found} has taken over the checkpoints in {self._store.url} from "
                f"attempt {self.record.attempt}; stop this one"
            )

    def release(self) -> None:
        """Say that this gang writes no more: the next may be of the same attempt. Never raises."""
        try:
            data, etag = self._store.get_with_etag(WRITER)
            if _parse(data, self._store).token == self.record.token:
                ended = replace(self.record, ended=time.time())
                self._store.put_if_match(WRITER, self._bytes(ended), etag)
        except (StoreError, CheckpointError) as error:
            log.warning("%s still names this gang as the writer: %s", WRITER, error)

    def _refuse(self, found: WriterRecord) -> None:
        """Raise if what is there may not be replaced."""
        mine, place = self.record, self._store.url
        if found.run_uid and mine.run_uid and found.run_uid != mine.run_uid:
            raise TakenOver(
                f"{place} holds the checkpoints of another run of this name (uid "
                f"{found.run_uid}, {found}), not of this one (uid {mine.run_uid}); give the job "
                "another name, or checkpoint.store another place"
            )
        if found.attempt > mine.attempt:
            raise TakenOver(
                f"{found} has taken over the checkpoints in {place} from attempt "
                f"{mine.attempt}; stop this one"
            )
        if found.attempt < mine.attempt or found.ended or found.stage_index < mine.stage_index:
            return
        raise TakenOver(
            f"{found} writes the checkpoints in {place} already, and this is another gang of "
            "that attempt; stop one of the two, and resume the run: a new attempt takes over"
        )

    @staticmethod
    def _bytes(record: WriterRecord) -> bytes:
        return json.dumps(asdict(record), sort_keys=True).encode()


def _parse(data: bytes, store: Store) -> WriterRecord:
    try:
        return WriterRecord(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{store.url}/{WRITER} does not say who writes ({error}); remove it once no worker of "
            "this run is alive"
        ) from error
