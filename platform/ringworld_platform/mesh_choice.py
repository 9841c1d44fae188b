"""The mesh that a stage tries, and when it gives up waiting for the workers that it wants."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ringworld_jobs.mesh import MeshSize, shrink_mesh
from ringworld_jobs.spec import JobSpec
from ringworld_model.config import can_split_heads
from ringworld_platform.stage_setup import mesh_of


class MeshChanged(Exception):
    """The stage begins again, on the mesh that fits now."""


class MeshChoice:
    """Chooses for one run, stage by stage and restart by restart.

    The wanted mesh is tried first, each time. Where the cluster as a whole is too small for it,
    the stage waits for nodes for ``recovery.shrink_after``, anew with each node that comes; then
    it takes what fits. As long as the cluster stays as it is, no later start waits again.
    """

    def __init__(
        self, spec: JobSpec, *, patient: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the run's spec.

        Args:
            spec: the job.
            patient: False where no node can ever come: nothing is waited for.
            clock: monotonic seconds.
        """
        self._spec, self._clock = spec, clock
        self._patience = spec.recovery.shrink_after if patient else 0.0
        self._index = 0
        self._wanted = self._tried = MeshSize(1, 1)
        self._model = spec.model.config()
        self._deadline: float | None = None
        self._there = 0
        self._settled: tuple[int, int] | None = None
        """Workers that were waited for in vain, and those that there were."""

    @property
    def wanted(self) -> MeshSize:
        """What the spec asks for in this stage."""
        return self._wanted

    def begin(self, index: int, there: int) -> MeshSize:
        """The mesh to try now.

        Args:
            index: the stage.
            there: workers that the cluster holds in all.

        Raises:
            PlatformError: the job's workers cannot form the stage's mesh.
        """
        self._index = index
        self._wanted = self._tried = mesh_of(self._spec, index)
        self._deadline, self._there = None, there
        if there >= self._wanted.world_size:
            self._settled = None
        elif self._given_up(there):
            self._tried = self._smaller(there) or self._wanted
        return self._tried

    def waiting(self, there: int, shortage: str) -> str:
        """The gang does not start.

        Args:
            there: workers that the cluster holds in all.
            shortage: why, in the words of who cannot place it.

        Returns:
            What to tell the user.

        Raises:
            MeshChanged: nodes were waited for in vain; ``begin`` gives a smaller mesh now.
        """
        if there >= self._tried.world_size:
            self._deadline = None
            return shortage
        smaller = self._smaller(there)
        if smaller is None:
            return shortage
        now = self._clock()
        if self._deadline is None or there > self._there:
            self._deadline = now + self._patience
        self._there = there
        left = self._deadline - now
        if left <= 0:
            self._settled = (self._wanted.world_size, there)
            raise MeshChanged
        return (
            f"{there} of {self._tried.world_size} workers are there; goes on with "
            f"{_difference(self._tried, smaller)} in {_about(left)} (recovery.shrink_after)"
        )

    def explain(self, mesh: MeshSize) -> str | None:
        """Why a stage runs on another mesh than the wanted one; None if it does not."""
        if mesh == self._wanted:
            return None
        stage = self._spec.stages[self._index]
        rows = stage.rows_per_step
        turns = rows // (mesh.data_parallel_size * stage.micro_batch_size)
        return (
            f"stage {stage.name} runs on {mesh}, not {self._wanted}: the cluster holds "
            f"{self._there} of {self._wanted.world_size} workers; a step keeps its "
            f"{rows} row{'s' * (rows > 1)}, {turns} micro-batch{'es' * (turns > 1)} a ring"
        )

    def _given_up(self, there: int) -> bool:
        if self._patience <= 0:
            return True
        if self._settled is None:
            return False
        waited_for, were = self._settled
        return there == were and self._wanted.world_size <= waited_for

    def _smaller(self, there: int) -> MeshSize | None:
        stage = self._spec.stages[self._index]
        return shrink_mesh(stage, self._spec.resources, there, may_split=self._may_split)

    def _may_split(self, heads_size: int) -> bool:
        return can_split_heads(self._model.num_heads, self._model.num_kv_heads, heads_size)


def _difference(wanted: MeshSize, smaller: MeshSize) -> str:
    """The axes that shrink, as in ``data_parallel 1``."""
    axes = (
        ("ring", wanted.ring_size, smaller.ring_size),
        ("heads", wanted.heads_size, smaller.heads_size),
        ("data_parallel", wanted.data_parallel_size, smaller.data_parallel_size),
    )
    return " and ".join(f"{name} {new}" for name, old, new in axes if old != new)


def _about(seconds: float) -> str:
    """Rounded up, so that a text which is told again and again seldom changes."""
    if seconds > 90:
        return f"{math.ceil(seconds / 60)} min"
    return f"{math.ceil(seconds / 10) * 10} s" if seconds > 10 else "less than 10 s"
