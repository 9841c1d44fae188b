"""One way to look at runs, whether a controller answers or only their folders are there."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ringworld_platform.errors import ClusterError, UnknownRunError
from ringworld_platform.run_folder import Page, RunFolder
from ringworld_platform.run_records import Record, read_spec

Records = list[Record]  # the views have a method called list


class RunView(Protocol):
    """What can be asked about runs; ``Client`` and ``FolderView`` both answer."""

    def status(self, name: str) -> Record:
        """The state of a run, by run id or job name (its newest run)."""

    def list(self) -> Records:
        """The state of every run, oldest first."""

    def events(self, name: str, after: int = 0) -> Records:
        """Events numbered above ``after``."""

    def metrics(self, name: str, after: int = 0) -> Page:
        """Metric records from ``after`` on."""

    def logs(self, name: str, rank: int = 0, after: int = 0) -> Page:
        """Lines of one rank's log from ``after`` on."""

    def log_ends(self, name: str) -> dict[int, int]:
        """The ranks that have a log, and the place behind its last line."""

    def spec(self, name: str) -> Record:
        """The resolved spec as plain data; empty where it cannot be read."""


class FolderView:
    """Reads run folders; changes nothing and needs no cluster."""

    def __init__(self, root: Path) -> None:
        """Take the folder that holds the runs; it need not exist."""
        from ringworld_platform.run_states import RunStates

        self._states = RunStates(root.absolute())

    def status(self, name: str) -> Record:
        """See ``RunView``.

        Raises:
            UnknownRunError: no such run or job.
        """
        return self._states.find(name).to_status()

    def list(self) -> Records:
        """See ``RunView``."""
        return self._states.statuses()

    def events(self, name: str, after: int = 0) -> Records:
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
        return read_spec(self._folder(name).path)

    def _folder(self, name: str) -> RunFolder:
        return RunFolder(self._states.root / self._states.find(name).run_id)


@dataclass(frozen=True, slots=True)
class OpenView:
    """A view and where it looks.

    Attributes:
        view: answers.
        live: a controller answers; else the folders do.
        where: the cluster's address or the folder of runs.
        poll_seconds: how long to wait between two looks.
    """

    view: RunView
    live: bool
    where: str
    poll_seconds: float = 0.5


@contextmanager
def open_view(
    runs: Path, address: str | None = None, store: str | None = None
) -> Iterator[OpenView]:
    """Look through the cluster if one is known, else at the run folders.

    A cluster is known when an address is given, by argument or RAY_ADDRESS, or `ringworld up`
    started one. The folders also show what `ringworld run` in another terminal does, and faster.

    Args:
        runs: folder of runs, for use without a cluster.
        address: Ray address of a cluster.
        store: url of a store on S3: look there, at what runs have left of themselves.

    Raises:
        ClusterError: the cluster that was asked for does not answer.
        UnknownRunError: the url is none that a store can have.
    """
    if store is not None:
        with _open_store_view(store) as opened:
            yield opened
        return
    from ringworld_platform import cluster, head

    asked = address or os.environ.get("RAY_ADDRESS")
    if asked is None and head.find_running() is None:
        yield OpenView(FolderView(runs), live=False, where=str(runs))
        return
    from ringworld_platform.client import Client

    info = cluster.connect(address)
    try:
        try:
            client = Client.attach(create=False)
        except ClusterError:
            if asked is not None:
                raise
            # `up` has run, but no job was ever submitted to it.
            yield OpenView(FolderView(runs), live=False, where=str(runs))
            return
        yield OpenView(client, live=True, where=info.address)
    finally:
        cluster.disconnect()


@contextmanager
def _open_store_view(url: str) -> Iterator[OpenView]:
    from ringworld_jobs.store_url import UnsafeUrl, parse_store
    from ringworld_platform.store_view import REFRESH_SECONDS, StoreView

    try:
        parse_store(url)
    except ValueError as error:
        shown = "" if isinstance(error, UnsafeUrl) else f"{url}: "
        raise UnknownRunError(f"{shown}{error}") from None
    with tempfile.TemporaryDirectory(prefix="ringworld-") as scratch:
        view = StoreView(url, Path(scratch))
        yield OpenView(view, live=True, where=url, poll_seconds=REFRESH_SECONDS)


def find_status(view: RunView, name: str | None) -> Record:
    """The state of the named run, or of the newest one.

    Args:
        view: where to look.
        name: run id or job name; None means the newest run of all.

    Raises:
        UnknownRunError: no such run; names the nearest one.
    """
    if name is None:
        runs = view.list()
        if not runs:
            raise UnknownRunError("there are no runs yet; start one with `ringworld run JOB.yaml`")
        return runs[-1]
    try:
        return view.status(name)
    except UnknownRunError as error:
        raise UnknownRunError(f"{error}{did_you_mean(name, view.list())}") from None


def did_you_mean(name: str, runs: list[dict[str, Any]]) -> str:
    """A hint with the nearest run id or job name, or nothing."""
    known = {str(run[key]) for run in runs for key in ("run_id", "job")}
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
