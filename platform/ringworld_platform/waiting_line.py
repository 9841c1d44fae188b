"""Whose turn it is to ask the cluster for room: higher priority first, then who came first."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class Place:
    """A waiting run."""

    run_id: str
    priority: int
    submitted: float
    possible: bool = True
    """Whether the cluster could hold it at all; a run that it cannot hold blocks nobody."""

    def order(self) -> tuple[int, float, str]:
        """Sorts who goes first to the front."""
        return -self.priority, self.submitted, self.run_id


class WaitingLine:
    """The runs that want workers now. Any thread may call any method."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}

    def join(self, place: Place) -> None:
        """Stand in the line."""
        with self._lock:
            self._places[place.run_id] = place

    def leave(self, run_id: str) -> None:
        """Go, served or not."""
        with self._lock:
            self._places.pop(run_id, None)

    def ahead(self, run_id: str) -> str | None:
        """The run that must be served before ``run_id``; None if it is its turn."""
        with self._lock:
            mine = self._places.get(run_id)
            if mine is None:
                return None
            others = [
                place
                for place in self._places.values()
                if place.possible and place.order() < mine.order()
            ]
        return min(others, key=Place.order).run_id if others else None
