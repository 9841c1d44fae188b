"""One job from its first part to its last: the state machine, in a thread of the controller.

Data first, then each part on a gang of its own: a stage's training, its evaluations. A failed gang
is built again, within the budget, and goes on from the newest committed checkpoint or the answers
that there are. What a gang says is logged as it comes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ringworld_jobs.any_job import Job
from ringworld_platform.agenda import Agenda
from ringworld_platform.drain import DrainWatch, Notice, Warnings
from ringworld_platform.errors import PlatformError
from ringworld_platform.evaluation_part import refuse_missed
from ringworld_platform.evidence import Evidence, save
from ringworld_platform.gang import Gang, GangSpec
from ringworld_platform.gang_watch import GangFailed
from ringworld_platform.hearing import Hearing
from ringworld_platform.job_ends import JobFailed, JobPreempted, JobReleased, JobStopped
from ringworld_platform.job_queue import JobQueue
from ringworld_platform.live_run import LiveRun, OwnershipLost
from ringworld_platform.mesh_choice import MeshChanged
from ringworld_platform.pace import Pace
from ringworld_platform.parts import Part, Result
from ringworld_platform.recovering import Recovering
from ringworld_platform.recovery import Failure, FailureKind
from ringworld_platform.repeats import Repeats
from ringworld_platform.room import Bundle
from ringworld_platform.run_state import RunState, next_attempt
from ringworld_platform.run_tracking import RunTracking
from ringworld_platform.runner_config import RunnerConfig
from ringworld_platform.scheduler import Demand
from ringworld_platform.stage_setup import device_of, heads_apart
from ringworld_platform.tracking_service import TrackingService
from ringworld_platform.turn import Turn
from ringworld_workers.log_lines import Redaction, log_line
from ringworld_workers.store.base import StoreError

log = logging.getLogger(__name__)

TURN_SECONDS = 0.2


class JobRunner:
    """Runs one job in a thread of its own."""

    def __init__(
        self,
        live: LiveRun,
        line: JobQueue,
        drains: DrainWatch,
        config: RunnerConfig,
        tracking: TrackingService,
    ) -> None:
        """Take a claimed run; ``start`` begins."""
        self.live, self._line, self._config = live, line, config
        self.spec: Job = live.spec
        self._stop = threading.Event()
        self._release = threading.Event()
        self._thread = threading.Thread(target=self._main, name=live.run_id, daemon=True)
        self._tracking = RunTracking(live, tracking)
        self._present: Gang | None = None
        self._part: Part | None = None
        """What the present gang is at, once it works; None while it starts, or prepares data."""
        self._stop_sent = False
        self._way: Demand | None = None
        """The run that the gang makes way for."""
        self._turn = Turn(live, line, one_shot=config.one_shot)
        self._agenda = Agenda(live, patient=not config.one_shot)
        self._warnings = Warnings(drains)
        self._repeats = Repeats()
        self._recovering = Recovering(live)
        self._hearing = Hearing(
            live,
            self._warnings,
            tick=self.tick,
            heed=self._heed,
            rhythm=lambda: line.rhythm,
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def request_stop(self) -> None:
        """Stop at the next checkpoint."""
        self._stop.set()

    def release(self) -> None:
        """End the gang at once and leave the run as it is, for another controller."""
        self._release.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_seconds)

    @property
    def active(self) -> bool:
        """Whether the run is at work here; not once its end was told: ``join`` for the rest."""
        return self._thread.is_alive() and not self.live.record.terminal

    # --- the job ---

    def _main(self) -> None:
        live = self.live
        try:
            if live.record.stop_requested:
                self._stop.set()
            self._tracking.start()
            refuse_missed(live)
            self._prepare()
            while (part := self._agenda.next()) is not None:
                self._until_done(partial(self._do, part))
            self._end(RunState.SUCCEEDED, self._agenda.ended)
        except JobStopped as stopped:
            where = f"at step {live.record.step} of stage {live.record.stage or 'data'}"
            saved = f"stopped {where}; resume continues there"
            self._end(RunState.STOPPED, str(stopped) or saved)
        except JobFailed as failed:
            self._end(RunState.FAILED, str(failed))
        except JobReleased:
            self._try(live.release)
        except OwnershipLost as lost:
            log.warning("%s", lost)
            self._try(live.let_go)
        except (PlatformError, StoreError) as error:
            self._end(RunState.FAILED, str(error))
        except Exception as error:
            log.exception("%s failed inside the controller", live.run_id)
            trace = Redaction(os.environ)(traceback.format_exc())
            place: dict[str, Any] = {
                "stage": live.record.stage or None,
                "attempt": live.record.attempt,
            }
            line = log_line(time.time(), "ERROR", __name__, "controller", trace, **place)
            self._try(lambda: live.folder.append_log(0, [line]))
            self._end(RunState.FAILED, f"controller: {type(error).__name__}: {error}")
        finally:
            self._line.leave(live.run_id)
            self._tracking.close()
            self._try(live.close)

    def _end(self, state: RunState, reason: str) -> None:
        """Reach a terminal state, even if the disk refuses to hear of it."""
        live = self.live
        self._line.leave(live.run_id)
        live.gang_ended()
        live.set_fields(place=None, start_seconds=None, waiting_since=None)
        error = reason if state is RunState.FAILED else None
        # The tracker's last words may take longer than a silent owner's lease.
        self._try(live.save)
        self._try(lambda: self._tracking.finish(state))
        try:
            live.conclude(state, reason, error)
        except OwnershipLost:
            self._try(live.let_go)
        except Exception as problem:
            log.warning("%s: %s", live.run_id, problem)
            # The disk may have refused; the state in memory must be terminal even so.
            live.set_fields(state=state, reason=reason, error=error)
            self._try(live.save)

    def _prepare(self) -> None:
        recipe, prepared = self.spec.data.recipe, self.live.record.prepared
        # The cache may have been cleared since an earlier controller looked.
        if recipe is not None and (prepared is None or not Path(prepared["dir"]).is_dir()):
            self._until_done(lambda: self._prepare_once(recipe))

    def _prepare_once(self, recipe: str) -> None:
        bundle = Bundle(self.spec.resources.cpus_per_worker)
        with self._gang("data", 1, bundle, self._config.stage_function) as gang:
            self._turn.wait(gang, self._pause)
            self.live.set_state(RunState.RUNNING, f"preparing data of {Path(recipe).name}")
            prepared = gang.prepare_data(recipe, self.spec.data.cache, self._pace())
        names = ", ".join(sorted(prepared["datasets"]))
        how = "found in the cache" if prepared.get("cached") else "built"
        text = f"datasets {names} {how} in {prepared['dir']}"
        # The reason too: the last phase of the build would stand there as if it still went on.
        self.live.set_fields(prepared=prepared, reason=text)
        self.live.event("data", text)
        self.live.save()

    def _until_done(self, action: Callable[[], None]) -> None:
        """Do it, again after failures as the policy says."""
        while True:
            if self._stop.is_set():
                raise JobStopped
            try:
                action()
                return
            except MeshChanged:
                continue
            except JobPreempted as preempted:
                self._step_aside(str(preempted))
            except GangFailed as failed:
                failure = self._warnings.explain(failed.failure, failed.when)
                self._recover(failure, failed.evidence)

    def _step_aside(self, reason: str) -> None:
        """Back to the line, with nothing lost and no restart counted."""
        live = self.live
        live.gang_ended()
        live.event("preempted", reason)
        live.set_fields(state=RunState.QUEUED, reason=reason, attempt=next_attempt(live.record))
        live.save()
        self._turn.lost(reason)

    def _recover(self, failure: Failure, evidence: Evidence | None) -> None:
        live = self.live
        live.gang_ended()
        live.confirm()
        kept = save(live.folder.path, live.record, failure, evidence)
        # What was announced is no failure of the run's.
        kind = "drain" if failure.kind is FailureKind.TAKEN_AWAY else "failure"
        told = {"failure": failure.kind.value, "rank": failure.rank, "evidence": kept}
        live.event(kind, failure.text, **told)
        step = evidence.step_of(failure.rank) if evidence is not None else live.record.step
        if hopeless := self._repeats.explain(failure, live.record.stage_index, step):
            raise JobFailed(hopeless)
        plan = self._recovering.plan(failure)
        decision = plan.decision
        if not decision.restart:
            raise JobFailed(decision.text)
        live.set_state(RunState.RECOVERING, decision.text, **plan.fields)
        deadline = time.monotonic() + decision.delay_seconds
        while (left := deadline - time.monotonic()) > 0:
            self._stop.wait(min(TURN_SECONDS, left))
            self.tick()

    def _do(self, part: Part) -> None:
        """Do a part of the job on a new gang."""
        live = self.live
        device = device_of(self.spec)
        threads = self.spec.resources.cpus_per_worker
        bundle = Bundle(threads, 1 if device == "cuda" else 0)
        mesh = part.begin(self._line.room(bundle))
        world_size = mesh.world_size
        job = part.job(mesh, device)
        pace = self._pace()
        with self._gang(part.name, world_size, bundle, part.function(self._config)) as gang:
            self._turn.wait(gang, self._pause, part)
            if smaller := part.explain(mesh):
                live.event("mesh", smaller)
            workers = "1 worker" if world_size == 1 else f"{world_size} workers"
            running = f"{part.title} on {workers}, attempt {job.attempt}"
            live.set_state(RunState.RUNNING, f"{running}: starting")
            timeout = pace.collective_seconds
            gang.start(job, num_threads=threads, collective_timeout_seconds=timeout)
            live.gang_started(gang.identities, device)
            if apart := heads_apart(mesh, [found.node for found in gang.identities]):
                live.event("mesh", apart)
            if not self._stop.is_set():
                live.set_state(RunState.RUNNING, running)
            self._part = part
            results = gang.run(pace)
        live.gang_ended()
        if results[0].get("status") == "stopped":
            self._stopped(part, results[0])
        part.done(results[0])

    def _stopped(self, part: Part, result: Result) -> None:
        """The gang has stopped as it was asked to: say why.

        Raises:
            JobPreempted, GangFailed, JobStopped: always one of them.
        """
        told = part.stopped(result)
        if self._way is not None and not self._stop.is_set():
            raise JobPreempted(self._made_way(self._way, result, told))
        if (taken := self._warnings.ended(result, told)) and not self._stop.is_set():
            raise GangFailed(taken)
        raise JobStopped(told)

    # --- gangs ---

    @contextmanager
    def _gang(self, name: str, size: int, bundle: Bundle, function: str) -> Iterator[Gang]:
        spec = GangSpec(
            name=f"{self.live.run_id}/{name}",
            size=size,
            bundle=bundle,
            stage_function=function,
            prepare_function=self._config.prepare_function,
            workers=self._config.workers,
        )
        self._stop_sent = False
        self._way = None
        self._warnings.forget()
        try:
            with Gang(spec, self._hearing) as gang:
                self._present = gang
                yield gang
        finally:
            self._part = self._present = None
            # Its room is kept until it asks again, or leaves.
            self._line.pause(self.live.run_id)

    def _pace(self) -> Pace:
        limit = self.spec.recovery.stall_timeout
        return Pace(None if limit == "auto" else limit)

    def _pause(self) -> None:
        """Between two looks of a wait."""
        self._stop.wait(TURN_SECONDS)
        self.tick()

    def tick(self) -> None:
        """Save now and then, and hear what the controller wants."""
        if self._release.is_set():
            raise JobReleased
        self._tracking.look()
        self.live.touch(self._line.rhythm.save)
        if self.live.record.stop_requested:
            self._stop.set()
        self._look_for_drains()
        if not self._stop.is_set():
            self._make_way()
            return
        if self._part is None or self._present is None:
            # No step is under way: there is nothing to save.
            raise JobStopped
        if not self._stop_sent:
            self._stop_sent = True
            self._line.leaving(self.live.run_id)
            self._present.request_stop()
            self.live.set_state(RunState.STOPPING, self._part.leaving)

    def _make_way(self) -> None:
        """Save and let go of the workers, if a run of a higher priority needs them."""
        live = self.live
        way = self._line.asked_to_leave(live.run_id) if self._way is None else None
        if way is None:
            return
        self._way = way
        self._line.leaving(live.run_id)
        if self._part is None or self._present is None:
            # No step is under way: there is nothing to save.
            raise JobPreempted(self._made_way(way, {}, ""))
        self._present.request_stop()
        text = f"{self._part.leaving}, to make way for {way.run_id} (priority {way.priority})"
        live.set_state(RunState.STOPPING, text)

    def _made_way(self, way: Demand, result: Result, told: str) -> str:
        by = f"preempted by {way.run_id} (priority {way.priority})"
        if told:
            return f"{by}; {told}"
        if "step" in result:
            return f"{by} at step {result['step']}; goes on from its checkpoint"
        return f"{by} before its first step"

    def _look_for_drains(self) -> None:
        gang = self._present
        notice = self._warnings.look(gang.rooms) if gang is not None else None
        if notice is None:
            return
        if self._part is None:
            # It builds data, or starts: there is nothing to save.
            raise GangFailed(Failure(FailureKind.TAKEN_AWAY, notice.text))
        self.live.event("drain", notice.text)
        self._heed(notice)

    def _heed(self, notice: Notice) -> None:
        """Use the time that is left: save, and end the gang."""
        if self._part is not None and self._present is not None and not self._stop.is_set():
            self._present.request_stop()
            text = f"{notice.text}: {self._part.leaving}, to go on elsewhere"
            self.live.set_state(RunState.RUNNING, text)

    def _try(self, action: Callable[[], Any]) -> None:
        """The last words of a run: what fails here has nobody left to tell."""
        try:
            action()
        except Exception as error:
            log.warning("%s: %s", self.live.run_id, error)
