"""Changes of a run's stored state that are not those of its work. Each takes and gives a record."""

from __future__ import annotations

from ringworld_platform.run_state import JobRecord, RunState


def ask_to_stop(record: JobRecord) -> JobRecord:
    """Its controller is to save a checkpoint and stop."""
    record.stop_requested = True
    return record


def stopped(record: JobRecord) -> JobRecord:
    """It has no controller, and shall not go on by itself."""
    record.state, record.reason, record.owner = RunState.STOPPED, "stopped", None
    record.stop_requested, record.workers = False, []
    return record


def failed(problem: str, record: JobRecord) -> JobRecord:
    """It cannot be begun."""
    record.state, record.reason, record.error = RunState.FAILED, problem, problem
    record.stop_requested, record.workers, record.owner = False, [], None
    return record


def fresh_start(older: bool, request: str, record: JobRecord) -> JobRecord:
    """It is to go on; ``request`` is the call that wants it."""
    record.state, record.reason, record.error = RunState.QUEUED, "resumed", None
    record.stop_requested, record.owner = False, None
    record.restarts = record.rollbacks = 0
    record.take_older, record.request, record.moved_to = older, request, None
    record.fetched = False
    # Whoever resumes has read which limits were missed.
    record.missed = ""
    # Looked up again: the cache may have been cleared since.
    record.prepared = None
    return record


def moved(how: str, record: JobRecord) -> JobRecord:
    """A controller elsewhere has it."""
    record.owner, record.moved_to = None, how
    return record


def freed(record: JobRecord) -> JobRecord:
    """Its controller could not begin it; any may try again."""
    record.owner = None
    return record
