"""Asks Ray's autoscaler for the nodes of stages that are yet to come: one request for all runs.

Ray keeps such a request until the next one comes, whoever made it, and nodes that it covers never
go. So a mark beside it says that it is ours: a controller that is started again, after a crash,
clears what the one before has left.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ringworld_jobs.mesh import MeshError, allowed_meshes
from ringworld_jobs.spec import JobSpec
from ringworld_model.config import can_split_heads
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.live_run import LiveRun
from ringworld_platform.prewarm import (
    EARLIER,
    NOTHING,
    Coming,
    EvaluationPace,
    Request,
    StagePace,
    StartTimes,
    plan_request,
)
from ringworld_platform.room import Bundle
from ringworld_platform.scheduler import Holding

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
END_SECONDS = 15.0
_MARK = b"ringworld_prewarm"


class Autoscaler(Protocol):
    """Where requests go."""

    def hold(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Have the cluster keep room for these; nothing: let go of it."""

    def clear_left(self) -> None:
        """Let go of what an earlier controller of this cluster has asked for."""


class RayAutoscaler:
    """Ray's own."""

    def hold(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """See ``Autoscaler``."""
        from ray.autoscaler.sdk import request_resources
        from ray.experimental import internal_kv

        if bundles:
            # First: a request without a mark would stay for ever, if we died in between.
            internal_kv._internal_kv_put(_MARK, b"1", overwrite=True)
        request_resources(bundles=[dict(bundle) for bundle in bundles])
        if not bundles:
            internal_kv._internal_kv_del(_MARK)

    def clear_left(self) -> None:
        """See ``Autoscaler``."""
        from ray.experimental import internal_kv

        if internal_kv._internal_kv_exists(_MARK):
            self.hold([])


@dataclass(frozen=True, slots=True)
class _Begin:
    """A run's next stage.

    Attributes:
        index: its place among the stages.
        moment: when it is expected to begin, in monotonic seconds.
        has: workers of the stage before it.
        bundle: resources of each.
    """

    index: int
    moment: float
    has: int
    bundle: Bundle


class Prewarmer:
    """A thread of the controller's."""

    def __init__(
        self,
        line: JobQueue,
        runs: Callable[[], Iterable[LiveRun]],
        autoscaler: Autoscaler | None = None,
    ) -> None:
        """Ask for nothing yet.

        Args:
            line: of all runs.
            runs: gives those that are at work.
            autoscaler: hears of it; default: Ray's.
        """
        self._line, self._runs = line, runs
        self._autoscaler = autoscaler or RayAutoscaler()
        self._starts = StartTimes()
        self._paces: dict[str, StagePace] = {}
        self._evaluations: dict[str, EvaluationPace] = {}
        self._begins: dict[str, _Begin] = {}
        self._held = NOTHING
        self._asked: float | None = None
        """Since when nodes of the request are lacking, in monotonic seconds."""
        self._waits: dict[str, tuple[float, float]] = {}
        """From when to when runs in the line waited for nodes, in monotonic seconds."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._main, name="prewarm", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Let go of all nodes, and end the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)

    def _main(self) -> None:
        left, told = True, ""
        while not self._closing.wait(LOOK_SECONDS):
            try:
                if left:
                    self._autoscaler.clear_left()
                    left = False
                self.look(time.monotonic())
                told = ""
            except Exception as error:
                # A head that is being started anew, say: the next look tries again.
                if str(error) != told:
                    told = str(error)
                    log.warning("cannot ask the autoscaler for nodes: %s", error)
        if self._held.bundles:
            try:
                self._autoscaler.hold([])
            except Exception as error:
                log.warning("nodes may stay until a controller starts: %s", error)

    def look(self, now: float) -> None:
        """Ask for what is due, and let go of what is not.

        Args:
            now: monotonic seconds.
        """
        holdings, asks = self._line.standing()
        lives = {live.run_id: live for live in self._runs()}
        for known in (self._paces, self._evaluations, self._begins, self._waits):
            for run_id in known.keys() - lives.keys():
                del known[run_id]
        comings = [
            coming
            for live in lives.values()
            if (coming := self._coming(live, holdings.get(live.run_id), now)) is not None
        ]
        self._see_waits(holdings, asks, now)
        if not self._held.bundles and not any(coming.due for coming in comings):
            return
        found = self._line.nodes()
        if found is None:
            return
        nodes = {node: room.total for node, room in found.nodes.items()}
        request = plan_request(comings, holdings, nodes, found.growth)
        self._see_request(request, holdings, now)
        if request.bundles != self._held.bundles and found.autoscaled:
            self._send(request, lives, comings, now)

    def _send(
        self,
        request: Request,
        lives: Mapping[str, LiveRun],
        comings: Sequence[Coming],
        now: float,
    ) -> None:
        self._autoscaler.hold(
            [bundle.resources() for bundle, n in request.bundles.items() for _ in range(n)]
        )
        before, self._held = self._held, request
        self._asked = now if request.new_nodes != 0 else None
        left = {coming.run_id: coming.left_seconds for coming in comings}
        for run_id in request.runs.keys() - before.runs.keys():
            live = lives[run_id]
            stage = live.spec.stages[self._begins[run_id].index].name
            number = request.new_nodes
            nodes = "nodes" if not number else f"{number} node{'s' * (number > 1)}"
            about = f"for stage {stage}, expected to begin in {max(0.0, left[run_id]):.0f} s"
            what = "keep its nodes" if number == 0 else f"add {nodes}"
            live.event("prewarm", f"asked the autoscaler to {what} {about}", nodes=number)

    def _coming(self, live: LiveRun, holding: Holding | None, now: float) -> Coming | None:
        """The run's next stage, if it wants more workers, and its beginning can be foretold."""
        spec, record, run_id = live.spec, live.record, live.run_id
        if not isinstance(spec, JobSpec):
            return None
        lead = spec.resources.prewarm
        if lead == "off":
            return None
        done = record.stages_done
        evaluation = self._evaluations.setdefault(run_id, EvaluationPace())
        evaluated = record.evaluated if _is_evaluated(spec, record.evaluated, done) else None
        evaluation.see(evaluated, now)
        if holding is not None:
            index = done if evaluated is not None else done + 1
            moment: float | None = None
            if index < len(spec.stages):
                moment = evaluation.end if evaluated is not None else self._end(live, now)
            if moment is None:
                self._begins.pop(run_id, None)
                return None
            if evaluated is None and any(spec.stages[done].evaluations.tasks()):
                moment += evaluation.expected_seconds
            has = sum(holding.places.values())
            self._begins[run_id] = _Begin(index, moment, has, holding.bundle)
        begin = self._begins.get(run_id)
        if begin is None or begin.index not in (done, done + 1):
            return None
        lead_seconds = self._starts.expected_seconds if lead == "auto" else lead
        left, asked = begin.moment - now, run_id in self._held.runs
        if abs(left) > EARLIER * lead_seconds:
            return None
        sizes = tuple(size for size in _sizes(spec, begin.index) if size > begin.has)
        if not sizes:
            return None
        order = (-record.priority, record.submitted, run_id)
        return Coming(run_id, order, sizes, begin.bundle, left, lead_seconds, asked)

    def _end(self, live: LiveRun, now: float) -> float | None:
        """When the training of the stage at hand is expected to end; None: it is too early."""
        record = live.record
        pace = self._paces.setdefault(live.run_id, StagePace())
        pace.see((record.stages_done, record.attempt, record.prepared is None), record.step, now)
        return pace.end(live.spec.stages[record.stages_done].num_steps)

    def _see_request(self, request: Request, holdings: Mapping[str, Holding], now: float) -> None:
        """Learn how long the nodes took that the request was for."""
        if self._asked is None or request.new_nodes != 0:
            return
        has = {run_id: sum(holding.places.values()) for run_id, holding in holdings.items()}
        in_use = all(has.get(run_id, 0) >= number for run_id, number in self._held.runs.items())
        if request.runs or in_use:
            self._starts.add(now - self._asked)
        self._asked = None

    def _see_waits(
        self, holdings: Mapping[str, Holding], asks: Mapping[str, int], now: float
    ) -> None:
        """Learn how long nodes took from the runs that had to wait for them."""
        for run_id, number in asks.items():
            # Where it is not known which nodes may come, or some were asked for before, the wait
            # says little.
            if number and run_id not in self._held.runs:
                began, _ = self._waits.get(run_id, (now, now))
                self._waits[run_id] = (began, now)
        for run_id in self._waits.keys() & holdings.keys():
            began, last = self._waits.pop(run_id)
            self._starts.add(last - began)


def _is_evaluated(spec: JobSpec, index: int, done: int) -> bool:
    """Whether a stage is among those that are trained, and asks for evaluations."""
    return index < done and any(spec.stages[index].evaluations.tasks())


def _sizes(spec: JobSpec, index: int) -> list[int]:
    """Workers that a stage may run on, the wanted number first."""
    model = spec.model.config()

    def may_split(heads_size: int) -> bool:
        return can_split_heads(model.num_heads, model.num_kv_heads, heads_size)

    try:
        meshes = allowed_meshes(spec.stages[index], spec.resources, may_split=may_split)
    except MeshError:
        return []  # told when the stage begins
    return [mesh.world_size for mesh in meshes]
