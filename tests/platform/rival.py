"""A controller in a process of its own, without Ray: it takes runs, and they wait for ever.

Reads a JSON object a line and answers with one; see ``Rivals`` in test_rivals.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mini_jobs import mini_job

from ringworld_platform.capacity import Cluster, NodeRoom
from ringworld_platform.client import absolute_paths
from ringworld_platform.controller import Controller, ControllerConfig
from ringworld_platform.errors import PlatformError
from ringworld_platform.live_run import LiveRun, claim, this_owner
from ringworld_platform.room import Room
from ringworld_platform.run_states import RunStates
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.stored_run import StoredRun


class Waiting:
    """A run that waits for workers."""

    active = True

    def __init__(self, live: LiveRun) -> None:
        self.live = live

    def start(self) -> None:
        self.live.save()


class Rival(Controller):
    """Knows of one node, and starts no gang."""

    def __init__(self, config: ControllerConfig) -> None:
        super().__init__(config)
        self._prewarmer.close()  # it would ask Ray
        room = Room(4, 0)
        self._cluster = lambda: Cluster({"here": NodeRoom(room, room)}, {})

    def _runner(self, live: LiveRun) -> Any:
        return Waiting(live)


def answer(me: Rival, name: str, ask: dict[str, Any]) -> str:
    root = Path(ask["root"])
    if ask["do"] == "submit":
        spec = mini_job(root, name=ask["job"])
        store = spec.checkpoint.model_copy(update={"store": ask["store"]})
        meant = absolute_paths(spec.model_copy(update={"checkpoint": store}), root)
        root = root / name if ask["apart"] else root
        return me.submit(meant.model_dump(mode="json", exclude_none=True), str(root))
    if ask["do"] == "claim":
        claim(RunStates(root), ask["run_id"], name)
    if ask["do"] == "take":
        run = StoredRun(f"{ask['store']}/{ask['run_id']}")
        run.take(RunStates(root).get(ask["run_id"]), this_owner(name))
    return name


def main(name: str, folder: str) -> None:
    me = Rival(ControllerConfig(name, folder, RunnerConfig(one_shot=True)))
    print(json.dumps("ready"), flush=True)  # noqa: T201 - its answer
    for line in sys.stdin:
        try:
            said: dict[str, str] = {"done": answer(me, name, json.loads(line))}
        except PlatformError as error:
            said = {"refused": str(error), "kind": type(error).__name__}
        print(json.dumps(said), flush=True)  # noqa: T201 - its answer


if __name__ == "__main__":
    main(*sys.argv[1:])
