"""A run's state and logs, kept in its S3 store while it runs: by a thread, never by the runner's.

A store may be slow or away for minutes, and the run goes on: nothing here makes its thread wait,
and what is not sent yet takes no memory, for it is read from the run's folder when its time comes.
The run's lease is renewed with each sending of the state. A lease that could not be renewed in time
is no reason to end a healthy gang, since a store that is away is away for others too; but from then
on nothing else is written, and once the store answers, another owner found there ends the run here.
Checkpoints have their own fence, which the next owner's gang takes.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from ringworld_platform.run_parts import (
    PART_BYTES,
    Part,
    find_parts,
    lengths,
    logs_in,
    whole_files,
    whole_key,
)
from ringworld_platform.run_state import JobRecord, Owner
from ringworld_platform.stored_run import StoredRun
from ringworld_workers.store.base import Conflict, StoreError

log = logging.getLogger(__name__)

STORE_LEASE_SECONDS = 60.0
BEATS_PER_LEASE = 6
LOGS_SECONDS = 60.0


class RunCopy:
    """Keeps one run's records in its store, for the controller that has taken it."""

    def __init__(self, run: StoredRun, taken: JobRecord, etag: str, folder: Path) -> None:
        """Take a run as it was taken.

        Args:
            run: its place in the store.
            taken: the record that its controller has put there.
            etag: of that record.
            folder: of the run, whose logs are copied.
        """
        if taken.owner is None:
            raise ValueError(f"{run.url}: nobody has taken it")
        self._run, self._etag, self._folder = run, etag, folder
        self._owner: Owner = taken.owner
        self._epoch = taken.epoch
        self._lease = taken.owner.lease_seconds
        self._beat_seconds = self._lease / BEATS_PER_LEASE
        # From the beat that others read, which is older than its sending.
        self._renewed = time.monotonic() - max(0.0, time.time() - taken.owner.beat)
        self._newest, self._last_state = taken, taken.state
        self._ends: dict[str, int] | None = None
        self._whole: dict[str, tuple[int, int]] = {}
        self._logs_due = 0.0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._done = threading.Event()
        self._finishing = False
        self._hurry = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._main, name=f"copy {taken.run_id}", daemon=True)
        self.taken_by: Owner | None = None
        """Who has taken the run over; this controller must let go of it."""
        self.stop_requested = False
        """Somebody has asked for a stop in the store."""
        self.problem: str | None = None
        """Why the store does not have the newest records, in one line."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def tell(self, record: JobRecord, *, hurry: bool = False) -> None:
        """Give the newest state; it is sent with the next beat. Takes microseconds.

        Args:
            record: not changed any more by the caller.
            hurry: send it, and the logs, before the beat is due: a checkpoint was committed.
        """
        with self._lock:
            self._newest = record
            self._hurry |= hurry
        if hurry:
            self._wake.set()

    def finish(self, record: JobRecord, timeout_seconds: float) -> bool:
        """Send the last state and what the logs lack, and end.

        Args:
            record: the state; its owner is let go of.
            timeout_seconds: longest wait. What is not sent by then is tried for as long as this
                process lives.

        Returns:
            Whether the store has everything.
        """
        with self._lock:
            self._newest, self._finishing = record, True
        self._wake.set()
        return self._done.wait(timeout_seconds) and self.problem is None

    def confirm(self, timeout_seconds: float) -> None:
        """Ask the store anew whose the run is, and wait for the answer, if it comes in time."""
        before = self._renewed
        with self._lock:
            self._hurry = True
        self._wake.set()
        deadline = time.monotonic() + timeout_seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self.taken_by is not None or self._renewed != before or self._done.wait(0.05):
                return

    def abandon(self) -> None:
        """Send nothing more."""
        self._abandoned = True
        self._wake.set()

    # --- the thread ---

    def _main(self) -> None:
        due = time.monotonic() + self._beat_seconds
        while not self._abandoned:
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()
            with self._lock:
                finishing, hurry, self._hurry = self._finishing, self._hurry, False
            late = time.monotonic() >= due
            if not (late or hurry or finishing):
                continue
            due = time.monotonic() + self._beat_seconds
            try:
                if not self._send(finishing=finishing, hurry=hurry):
                    self.problem = f"the run was taken over by {self.taken_by}"
                    self._done.set()
                    return
                self.problem = None
                if finishing:
                    self._done.set()
                    return
            except (StoreError, OSError) as error:
                self._note(error)
            except Exception as error:  # a damaged record: said, and tried again
                self._note(error)

    def _send(self, *, finishing: bool, hurry: bool) -> bool:
        """Renew the lease and copy what is due; False once the run is another's."""
        # The last state goes last: whoever reads that a run has ended finds all of it.
        if not self._renew(ended=False):
            return False
        if finishing or hurry or time.monotonic() >= self._logs_due:
            self._copy_logs()
            self._copy_whole()
            if self._may_write():
                self._logs_due = time.monotonic() + LOGS_SECONDS
        return self._renew(ended=True) if finishing else True

    def _renew(self, *, ended: bool) -> bool:
        """Put the newest state there, and with it the lease."""
        while True:
            with self._lock:
                newest = self._newest
            began = time.monotonic()
            owner = None if ended else self._owner.model_copy(update={"beat": time.time()})
            update = {"owner": owner, "epoch": self._epoch, "store": self._run.url}
            if not ended and newest.terminal:
                # Its logs come first; until then it has not ended.
                update["state"] = self._last_state
            record = newest.model_copy(update=update)
            try:
                self._etag = self._run.write(record, self._etag)
            except Conflict:
                if not self._still_ours():
                    return False
                continue
            self._last_state = record.state
            self._renewed = began
            return True

    def _still_ours(self) -> bool:
        """After a conflict: somebody has asked for a stop, or has taken the run."""
        found = self._run.read()
        if found is None:
            # Removed by hand: there is nobody else.
            self._etag = self._run.write(self._newest, None)
            return True
        record, self._etag = found
        mine = record.epoch == self._epoch
        if mine and record.owner and record.owner.controller == self._owner.controller:
            self.stop_requested |= record.stop_requested
            return True
        self.taken_by = record.owner or Owner(
            controller="", host="another machine", pid=0, beat=record.updated
        )
        log.warning("%s was taken over by %s", self._run.run_id, self.taken_by)
        return False

    def _copy_logs(self) -> None:
        """Copy the whole lines that the store lacks, in pieces of bounded size."""
        if self._ends is None:
            self._ends = lengths(find_parts(self._run.store, self._run.run_id))
        for name in logs_in(self._folder):
            while piece := self._read(name, self._ends.get(name, 0)):
                if not self._may_write():
                    return
                start = self._ends.get(name, 0)
                part = Part(name, self._epoch, start, len(piece))
                self._run.store.put(self._run.key(part.key), [piece])
                self._ends[name] = start + len(piece)

    def _read(self, name: str, start: int) -> bytes:
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            data = file.read(PART_BYTES)
        whole = data[: data.rfind(b"\n") + 1]
        # A line that is longer than a piece is cut.
        return data if not whole and len(data) == PART_BYTES else whole

    def _copy_whole(self) -> None:
        """Copy the other files that have changed."""
        for name in whole_files(self._folder):
            path = self._folder / name
            about = path.stat()
            version = (about.st_mtime_ns, about.st_size)
            if self._whole.get(name) == version or not self._may_write():
                continue
            key = self._run.key(whole_key(name, self._epoch))
            self._run.store.put(key, [path.read_bytes()])
            self._whole[name] = version

    def _may_write(self) -> bool:
        """Whether nobody can have taken the run: the lease is fresh, by a clock of this process."""
        return not self._abandoned and time.monotonic() - self._renewed < self._lease

    def _note(self, error: Exception) -> None:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if self.problem is None:
            log.warning("%s: its records in the store are behind: %s", self._run.run_id, line)
        self.problem = line
