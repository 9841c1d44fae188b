"""The process that tracks a controller's runs: told on stdin what to do, tells on stdout how it is.

MLflow, and the drawing of curves, hold Python's lock for up to seconds at a time; here nobody waits
for them. One line of JSON a message, both ways. It ends as soon as stdin does: with its controller.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ringworld_jobs.any_job import parse_job
from ringworld_platform.tracking import Tracker

LOOK_SECONDS = 0.1
# Training on the same cores comes first.
_NICENESS = 5


class Trackers:
    """The trackers of all runs, by run folder."""

    def __init__(self) -> None:
        """There are none yet."""
        self._trackers: dict[str, Tracker] = {}
        self._told: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def obey(self, message: dict[str, Any]) -> None:
        """Do what a message says: ``start``, ``end`` or ``abandon`` the tracking of a folder."""
        folder = str(message["folder"])
        with self._lock:
            tracker = self._trackers.get(folder)
            if message["do"] == "start":
                if tracker is not None:
                    tracker.abandon()
                spec = parse_job(message["spec"])
                tracker = Tracker(Path(folder), spec, str(message["run_id"]))
                self._trackers[folder] = tracker
                self._told.pop(folder, None)
                tracker.start()
            elif tracker is not None and message["do"] == "end":
                tracker.end(str(message["status"]))
            elif tracker is not None and message["do"] == "abandon":
                tracker.abandon()
                del self._trackers[folder]

    def changes(self) -> list[dict[str, Any]]:
        """How each tracker is that is not as it was when last asked."""
        with self._lock:
            found = []
            for folder, tracker in self._trackers.items():
                state = {
                    "folder": folder,
                    "state": tracker.state,
                    "problem": tracker.problem,
                    "dropped": tracker.dropped,
                }
                if self._told.get(folder) != state:
                    self._told[folder] = state
                    found.append(state)
            return found


def main() -> None:
    """Serve until stdin ends."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    os.nice(_NICENESS)
    # Libraries print to stdout as they please; what the controller reads goes another way.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    trackers = Trackers()
    threading.Thread(target=_tell, args=(trackers, answers), daemon=True).start()
    for line in sys.stdin:
        trackers.obey(json.loads(line))
    # At once: whatever is on its way is sent again by whoever goes on.
    os._exit(0)


def _tell(trackers: Trackers, answers: Any) -> None:
    while True:
        for change in trackers.changes():
            answers.write(json.dumps(change) + "\n")
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
