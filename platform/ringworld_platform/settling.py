"""What a command leaves of a run when it is ended before the run could stop."""

from __future__ import annotations

import logging
from pathlib import Path

from ringworld_platform.errors import PlatformError
from ringworld_platform.run_changes import stopped
from ringworld_platform.run_state import JobRecord
from ringworld_platform.run_states import RunStates
from ringworld_platform.stored_run import StoredRun, plain_errors
from ringworld_workers.store.base import Conflict

log = logging.getLogger(__name__)


def settle(root: Path, run_id: str) -> None:
    """Say of a run that was asked to stop, and whose controller is gone, that it has stopped.

    Ctrl-C twice ends controller and gang before they can. Never raises: what is not said now, the
    next command that takes the run finds out.

    Args:
        root: folder of runs.
        run_id: which one; its cluster has ended.
    """

    def end(record: JobRecord) -> JobRecord:
        return stopped(record) if record.stop_requested and record.abandoned() else record

    try:
        record = RunStates(root).update(run_id, end)
        if record.terminal and record.store is not None:
            settle_stored(record)
    except PlatformError as error:
        log.warning("%s: %s", run_id, error)


def settle_stored(record: JobRecord) -> None:
    """Tell a run's store of its end, if it was away when the run ended.

    Args:
        record: of the run's folder, terminal.

    Raises:
        PlatformError: the store is still away.
    """
    run = StoredRun(record.store or "")
    with plain_errors(run.url):
        found = run.read()
        if found is not None and found[0].epoch == record.epoch and not found[0].terminal:
            try:
                run.write(record, found[1])
            except Conflict:
                log.info("%s was taken by another controller", run.url)
