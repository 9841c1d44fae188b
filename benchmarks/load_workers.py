"""Workers of the load test: many ranks in each of a few processes, speaking as real ones do.

Everything between a rank's outbox and the run folder is the real thing: the calls, the replies, the
records and their sizes. What a rank has no use for here, it leaves out: torch, a process group, a
model, and a process of its own.
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import ray

from ringworld_workers.actor import Drained, Examined, Identity, WorkerFailure
from ringworld_workers.recorder import Recorder
from ringworld_workers.stacks import own_stacks
from ringworld_workers.stage_job import StageJob

STEP_SECONDS = 1.0
LOG_STEPS = 10
CHECKPOINT_STEPS = 30
THREADS_SECONDS = 10.0
PHASES = ("data", "forward", "backward", "optimizer")


class LoadRank:
    """One rank: a step a second, four phases each; rank 0 writes a line of metrics a step."""

    def __init__(self) -> None:
        """Wait to be set up."""
        self._recorder = Recorder()
        self._job: StageJob | None = None
        self._rank = 0
        self._fails = asyncio.Event()

    def identity(self) -> Identity:
        """As ``RingWorker.identity``; no GPU."""
        context = ray.get_runtime_context()
        return Identity(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), ())

    def load(self) -> None:
        """Nothing to import."""

    def open_rendezvous(self, world_size: int, timeout_seconds: float) -> tuple[str, int]:
        """No process group is made, so that nobody calls there."""
        return "127.0.0.1", 1

    def setup(self, rank: int, host: str, port: int, job: StageJob, *timing: float) -> None:
        """Take the rank and the job."""
        self._rank, self._job = rank, job

    async def run_stage(self) -> dict[str, Any] | WorkerFailure:
        """Report each second until asked to stop."""
        try:
            return await self._train()
        except RuntimeError as error:
            return WorkerFailure.of(error)

    def drain(self, after_seq: int) -> Drained:
        """As ``RingWorker.drain``."""
        entries = self._recorder.drain(after_seq)
        return Drained(entries, self._recorder.progress(), self._recorder.awaited())

    def examine(self) -> Examined:
        """As ``RingWorker.examine``; there is no thread to look at."""
        return Examined(self._recorder.progress(), own_stacks(None))

    def request_stop(self) -> None:
        """As ``RingWorker.request_stop``."""
        self._recorder.request_stop()

    def is_first_of(self, runs: list[str]) -> bool:
        """Whether this is rank 0 of one of these runs."""
        return self._rank == 0 and self._job is not None and self._job.run_id in runs

    def fail(self) -> None:
        """Raise in the step that is under way."""
        self._fails.set()

    async def _train(self) -> dict[str, Any]:
        job, recorder = self._job, self._recorder
        if job is None:
            raise RuntimeError("setup comes first")
        name, step = job.stage.name, 0
        # Gangs do not keep step with each other, ranks of one do.
        await asyncio.sleep(random.Random(job.run_id).random() * STEP_SECONDS)
        if self._rank == 0:
            recorder.metrics({**self._about(0), "kind": "stage_start", "resumed_from": None})
        while not recorder.should_stop() and step < job.stage.num_steps:
            step += 1
            for phase in PHASES:
                recorder.phase(phase, step)
                try:
                    await asyncio.wait_for(self._fails.wait(), STEP_SECONDS / len(PHASES))
                except TimeoutError:
                    continue
                raise RuntimeError(f"asked to fail, at {time.time():.6f}")
            if step % LOG_STEPS == 0:
                recorder.log_line(f"{time.ctime()} INFO load: rank {self._rank} at step {step}")
            if self._rank == 0:
                recorder.metrics(self._figures(step))
                if step % CHECKPOINT_STEPS == 0:
                    key = f"{job.stage_index:02d}-{name}/step-{step:08d}"
                    about = {**self._about(step), "kind": "checkpoint", "key": key}
                    recorder.metrics({**about, "bytes": 1 << 30})
        ended = "stopped" if recorder.should_stop() else "finished"
        return {"status": ended, "step": step, "checkpoint": None}

    def _about(self, step: int) -> dict[str, Any]:
        job = self._job
        return {
            "stage": job.stage.name if job else "",
            "stage_index": job.stage_index if job else 0,
            "attempt": job.attempt if job else 0,
            "step": step,
            "global_step": step,
            "time": time.time(),
        }

    def _figures(self, step: int) -> dict[str, Any]:
        """A line as long as a real one's."""
        names = ("accuracy_text", "accuracy_vision", "loss_text", "loss_vision", "grad_norm")
        seconds = ("data", "forward", "backward", "optimizer", "checkpoint_stall", "step")
        more = ("ring_bytes", "ring_wait", "memory_bytes", "memory_peak_bytes", "padding_share")
        return {
            "kind": "step",
            **self._about(step),
            "loss": 1 / step,
            "tokens_per_second": 123456.789,
            "learning_rate": 0.0003,
            **dict.fromkeys(names, 0.123456789012),
            **{f"{one}_seconds": 0.0123456789 for one in seconds},
            **dict.fromkeys(more, 123456.789),
            "rows": [0, 4],
            "sample_ids": [f"books:{step}:{row}" for row in range(4)],
        }


class LoadHost:
    """A process of many ranks. Its methods run in one thread, the ranks' work as coroutines."""

    def __init__(self) -> None:
        """There are no ranks yet."""
        self._ranks: dict[str, LoadRank] = {}

    @ray.method(enable_task_events=False)
    async def call(self, key: str, method: str, *args: Any) -> Any:
        """Call a rank's method; the rank is made by its first call."""
        if method == "end":
            self._ranks.pop(key, None)
            return None
        reply = getattr(self._ranks.setdefault(key, LoadRank()), method)(*args)
        return await reply if asyncio.iscoroutine(reply) else reply

    @ray.method(enable_task_events=False)
    async def drain(self, key: str, after_seq: int) -> Drained:
        """Answer for a rank: a method of its own, since a real worker's has one argument too."""
        return self._ranks[key].drain(after_seq)

    async def fail(self, runs: list[str]) -> None:
        """Let the first rank of these runs raise, where it is here."""
        for rank in self._ranks.values():
            if rank.is_first_of(runs):
                rank.fail()


class LoadHandle:
    """What the controller holds instead of an actor's handle: calls become calls of the host."""

    def __init__(self, host: Any, key: str) -> None:
        """Name a rank of a host."""
        self.host, self.key = host, key

    def __getattr__(self, method: str) -> _Call:
        """A method, as on an actor's handle."""
        return _Call(self, method)


class _Call:
    def __init__(self, handle: LoadHandle, method: str) -> None:
        self._handle, self._method = handle, method

    def remote(self, *args: Any) -> Any:
        if self._method == "drain":
            return self._handle.host.drain.remote(self._handle.key, *args)
        return self._handle.host.call.remote(self._handle.key, self._method, *args)


def _tell_threads(folder: Path) -> None:
    """Write down now and then what CPU time the threads took; runners are counted as one."""
    before: dict[str, float] = {}
    while True:
        time.sleep(THREADS_SECONDS)
        used: dict[str, float] = {}
        for thread in threading.enumerate():
            name = "runners" if thread.name.startswith("load-") else thread.name
            about = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            seconds = int(about.read_text().split()[0]) / 1e9 if about.exists() else 0.0
            used[name] = used.get(name, 0.0) + seconds
        share = {
            name: round(100 * (seconds - before.get(name, 0.0)) / THREADS_SECONDS, 2)
            for name, seconds in used.items()
        }
        lines = [f"{percent:6.2f} % {name}" for name, percent in share.items() if percent > 0.1]
        (folder / "threads.txt").write_text("\n".join(sorted(lines, reverse=True)) + "\n")
        before = used


class LoadWorkers:
    """Makes ranks in the hosts, in turns; lives in the controller."""

    def __init__(self, hosts: list[str], profile: Path | None = None) -> None:
        """Take the hosts.

        Args:
            hosts: names of ``LoadHost`` actors.
            profile: folder for a profile of each runner's thread, by CPU time.
        """
        self._names, self._profile = hosts, profile
        self._hosts: list[Any] = []
        self._made = 0
        self._profiles: dict[str, cProfile.Profile] = {}

    def make(self, stage_function: str, prepare_function: str, **options: Any) -> LoadHandle:
        """See ``Workers``."""
        if not self._hosts:
            # Here, because handles would make the controller's arguments too large to restart it.
            self._hosts = [ray.get_actor(name, namespace="ringworld") for name in self._names]
            if self._profile is not None:
                threading.Thread(target=_tell_threads, args=[self._profile], daemon=True).start()
        self._made += 1
        thread = threading.current_thread().name
        if self._profile is not None and thread not in self._profiles:
            self._profiles[thread] = cProfile.Profile(time.thread_time)
            self._profiles[thread].enable()
        key = f"{options['name']} {self._made}"
        return LoadHandle(self._hosts[self._made % len(self._hosts)], key)

    def end(self, worker: LoadHandle) -> None:
        """See ``Workers``."""
        profile = self._profiles.pop(threading.current_thread().name, None)
        if profile is not None and self._profile is not None:
            profile.disable()
            profile.dump_stats(self._profile / f"{threading.get_ident()}.prof")
        worker.host.call.remote(worker.key, "end")
