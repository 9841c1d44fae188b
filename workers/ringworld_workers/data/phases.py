"""The phases of a build: who does each, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ringworld_workers.data.work import InProcess, Item, Mapper, Progress, Result

LITTLE_BYTES = 64 << 20
"""Work of less weight is done in this process: Ray Data takes seconds to start, as long as this
takes to read and tokenize on two or three cores."""

Cluster = Callable[[], Mapper | None]
"""Finds or starts a cluster; called once, and only where there is much to do."""


def connected() -> Mapper | None:
    """The cluster that this process is connected to, if it is."""
    # Ray takes a second to import; here there is work for many.
    from ringworld_workers.data.ray_items import connected_mapper

    return connected_mapper()


class Phases:
    """Does the phases of one build, and tells of them."""

    def __init__(
        self, on_progress: Progress, cluster: Cluster, little_bytes: int = LITTLE_BYTES
    ) -> None:
        """Take whom to tell, where to find a cluster, and what is too little for one."""
        self._on_progress, self._cluster, self._little = on_progress, cluster, little_bytes
        self._found: Mapper | None = None
        self._asked = False

    def say(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Tell what is being done; ``total`` 0: its size is not known."""
        self._on_progress(phase, done, total)

    def map(
        self,
        phase: str,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        weight: int,
        *,
        accelerated: bool = False,
    ) -> Iterator[Result]:
        """Do tasks where it is fastest, and tell how many are done.

        Args:
            phase: what is being done.
            function: does one.
            items: the tasks.
            weight: bytes of text that take about as long.
            accelerated: the function uses a GPU where there is one.

        Yields:
            The results in any order.
        """
        if not items:
            return
        mapper = self._mapper(weight, len(items))
        label = f"{phase}, {mapper.place}"
        self.say(label, 0, len(items))
        results = mapper.map(function, items, accelerated=accelerated)
        for done, result in enumerate(results, start=1):
            self.say(label, done, len(items))
            yield result

    def _mapper(self, weight: int, count: int) -> Mapper:
        if weight < self._little or count < 2:
            return InProcess()
        if not self._asked:
            self._found, self._asked = self._cluster(), True
        return self._found or InProcess()
