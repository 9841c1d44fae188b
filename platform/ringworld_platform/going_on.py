"""What a new cluster does first: it goes on with the runs that the last one left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringworld_platform.run_state import JobRecord
from ringworld_platform.run_states import RunStates
from ringworld_platform.runs_roots import USERS_LIST, RootList


def unfinished(roots_file: str = USERS_LIST) -> list[JobRecord]:
    """Runs that no controller has in hand, in the folders that clusters were given.

    Args:
        roots_file: list of those folders.
    """
    roots = RootList(Path(roots_file)).all()
    found = [record for root in roots for record in RunStates(root).all()]
    return [record for record in found if record.abandoned() and not record.stop_requested]


def go_on() -> list[str]:
    """Start the controller of the cluster of ``up``, if there is anything for it to go on with.

    Returns:
        Ids of the runs that it takes up.

    Raises:
        ClusterError: the cluster does not answer.
    """
    left = unfinished()
    if not left:
        return []
    from ringworld_platform import cluster

    cluster.connect()
    try:
        return take_up(left)
    finally:
        cluster.disconnect()


def take_up(left: list[JobRecord], *, runner: Any = None) -> list[str]:
    """Start the controller of the cluster that is connected: it finds these runs by itself.

    Args:
        left: at least one.
        runner: how runs behave (``RunnerConfig``), in place of the default.

    Returns:
        Their ids.
    """
    from ringworld_platform.client import Client

    root = Path(left[0].run_folder).parent
    Client.attach(root, runner=runner, roots_file=USERS_LIST).list()
    return [record.run_id for record in left]
