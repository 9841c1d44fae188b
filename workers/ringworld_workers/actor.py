"""One rank as a Ray actor. It delegates everything: this is the only file here that knows Ray.

Two groups of threads: ``train`` (one thread) runs the stage, ``control`` answers while it runs.
What needs torch is imported inside the methods, on the worker: the controller that holds the
handles may live on a machine without it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from ringworld_workers.log_lines import PlainFormatter, Redaction
from ringworld_workers.oom_kills import OomKills, read_oom_kills
from ringworld_workers.rank_gauges import RankGauges
from ringworld_workers.recorder import Entry, Progress, Recorder, RecorderHandler
from ringworld_workers.stacks import Stacks, own_stacks, write_stacks_on_signal
from ringworld_workers.stage_job import GangJob

log = logging.getLogger(__name__)

CONTROL_THREADS = 4


@dataclass(frozen=True, slots=True)
class Identity:
    """Where a worker lives: what gangs are sorted by."""

    node: str
    ip: str
    pid: int
    gpus: tuple[int, ...]
    errors_file: str = ""
    """Where it writes its stacks on SIGUSR1, see ``stacks``."""
    oom_kills: OomKills = OomKills()
    """The kernel's counters where it lives, before it began its work."""


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """An exception of a worker as plain data: its class may not exist where this is read.

    Attributes:
        types: names of the exception's class and of its bases, nearest first.
        message: its text.
        traceback: the whole trace.
        time: when it was caught, seconds since the epoch.
        facts: plain data that the exception carries for who judges it.
    """

    types: tuple[str, ...]
    message: str
    traceback: str
    time: float
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> WorkerFailure:
        """Describe ``error``; call inside its except block."""
        types = tuple(c.__name__ for c in type(error).__mro__ if c is not object)
        text = str(error).strip() or type(error).__name__
        facts = dict(getattr(error, "facts", {}))
        return cls(types, text, traceback.format_exc(), time.time(), facts)


@dataclass(frozen=True, slots=True)
class Drained:
    """Reply to ``drain``: new entries, and the heartbeat."""

    entries: list[Entry]
    progress: Progress
    awaited: bool = False
    """The rank waits to hear that its records are in the logs."""


@dataclass(frozen=True, slots=True)
class Examined:
    """Reply to ``examine``: the heartbeat, and what the rank's threads are doing."""

    progress: Progress
    stacks: Stacks
    oom_kills: OomKills = OomKills()
    """The kernel's counters where it lives, now."""


class RingWorker:
    """One rank: made in a placement group, told its rank, given one stage to run."""

    def __init__(self, stage_function: str, prepare_function: str) -> None:
        """Set up logging; nothing heavy.

        Args:
            stage_function: ``module:function`` that trains a stage, or does other work of a gang.
            prepare_function: ``module:function`` that builds a data recipe.
        """
        self._stage_function = stage_function
        self._prepare_function = prepare_function
        self._recorder = Recorder()
        self._rendezvous: Any = None
        self._mesh: Any = None
        self._job: GangJob | None = None
        self._rank = 0
        self._training_thread: int | None = None
        self._errors_file = write_stacks_on_signal()
        self._log = _log_to(self._recorder)
        self._was_warned = False
        # Ray makes actors in the main thread, the only one that may do this.
        self._end: Any = signal.signal(signal.SIGTERM, self._warned)

    def _warned(self, signum: int, frame: FrameType | None) -> None:
        """Take the first SIGTERM for the notice that this process will soon be gone."""
        if self._job is None or self._was_warned:
            self._end(signum, frame)
            return
        # Also where a stop was asked for already: its checkpoint is not there yet.
        self._was_warned = True
        # Not in this frame: the thread that it interrupts may hold the recorder's lock.
        threading.Thread(target=self._save_and_stop, name="warned", daemon=True).start()

    def _save_and_stop(self) -> None:
        self._recorder.request_stop()
        text = f"rank {self._rank} (pid {os.getpid()}) got SIGTERM"
        self._recorder.event({"kind": "drain", "text": text})

    @ray.method(concurrency_group="control")
    def identity(self) -> Identity:
        """Where this worker lives."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Identity(
            node=context.get_node_id(),
            ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            gpus=tuple(int(gpu) for gpu in gpus if str(gpu).isdigit()),
            errors_file=self._errors_file,
            oom_kills=read_oom_kills(),
        )

    @ray.method(concurrency_group="train")
    def load(self) -> None:
        """Import what the stage needs, on all ranks at once, while the gang is being arranged."""
        self._training_thread = threading.get_ident()
        self._recorder.phase("import", 0)
        _spare_imports()
        importlib.import_module("torch.distributed")
        importlib.import_module(self._stage_function.partition(":")[0])

    @ray.method(concurrency_group="control")
    def open_rendezvous(self, world_size: int, timeout_seconds: float) -> tuple[str, int]:
        """Open the store at which the gang meets (rank 0 alone), on a port that the system picks.

        Returns:
            Host and port.
        """
        from ringworld_workers.rendezvous import open_rendezvous

        host = ray.util.get_node_ip_address()
        timeout = timedelta(seconds=timeout_seconds)
        self._rendezvous, port = open_rendezvous(host, world_size, timeout)
        return host, port

    @ray.method(concurrency_group="train")
    def setup(
        self,
        rank: int,
        host: str,
        port: int,
        job: GangJob,
        num_threads: int,
        timeout_seconds: float,
    ) -> WorkerFailure | None:
        """Join the gang's process group and lay out the mesh. Every rank calls it.

        Args:
            rank: this worker's place.
            host: rank 0's rendezvous.
            port: rank 0's rendezvous.
            job: what the stage function is told.
            num_threads: threads of one torch operation on CPU.
            timeout_seconds: after which a collective of a lost peer fails by itself; the gang's
                watch is meant to be faster.
        """
        node = ray.util.get_node_ip_address()
        self._log.place(rank=rank, stage=job.stage_name, attempt=job.attempt, node=node)
        try:
            self._recorder.phase("rendezvous", 0)
            self._join(rank, host, port, job, num_threads, timedelta(seconds=timeout_seconds))
        except Exception as error:
            return self._failed(error)
        return None

    def _join(
        self, rank: int, host: str, port: int, job: GangJob, num_threads: int, timeout: timedelta
    ) -> None:
        import torch
        from torch import distributed as dist

        from ringworld_workers.mesh import build_mesh

        torch.set_num_threads(num_threads)
        if job.device == "cuda":
            # Ray shows each worker its own GPU only.
            torch.cuda.set_device(0)
        store = self._rendezvous
        if store is None:
            store = dist.TCPStore(host, port, job.world_size, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if job.device == "cuda" else "gloo",
            store=dist.PrefixStore(job.group_name, store),
            rank=rank,
            world_size=job.world_size,
            timeout=timeout,
        )
        self._mesh = build_mesh(
            job.sequence_parallel_size,
            job.data_parallel_size,
            job.device,
            timeout,
            heads_size=job.heads_size,
        )
        self._job, self._rank = job, rank
        self._show_gauges(job, rank)
        log.info(
            "rank %d of %d (%s, pid %d) joined on %s, %d threads",
            rank,
            job.world_size,
            job.group_name,
            os.getpid(),
            job.device,
            num_threads,
        )

    def _show_gauges(self, job: GangJob, rank: int) -> None:
        from ray.util.metrics import Gauge

        from ringworld_workers.metrics import memory_bytes

        memory = partial(memory_bytes, self._mesh.device)
        tags = {"run": job.run_id, "stage": job.stage_name, "rank": str(rank)}
        RankGauges(Gauge, self._recorder, memory, tags, export_seconds() / 2).start()

    @ray.method(concurrency_group="train")
    def run_stage(self) -> dict[str, Any] | WorkerFailure:
        """Run the stage to its end, to a stop request, or to a failure.

        Returns:
            What the stage function returned, or the exception that it raised.
        """
        try:
            run: Callable[..., dict[str, Any]] = _named(self._stage_function)
            result = run(self._job, self._mesh, self._recorder)
            log.info("stage %s at step %s", result.get("status"), result.get("step"))
            return result
        except Exception as error:
            return self._failed(error)

    @ray.method(concurrency_group="train")
    def prepare_data(self, recipe: str, cache: str) -> dict[str, Any] | WorkerFailure:
        """Build a data recipe into the cache, or find it there.

        Returns:
            ``{"dir", "datasets", "tokenizer_size", "codebook_size", "cached"}``.
        """
        self._training_thread = threading.get_ident()
        try:
            build: Callable[..., Any] = _named(self._prepare_function)
            prepared = build(Path(recipe), Path(cache), self._prepare_progress)
            return {
                "dir": str(prepared.dir),
                "datasets": {name: str(folder) for name, folder in prepared.datasets.items()},
                "tokenizer_size": prepared.tokenizer_size,
                "codebook_size": prepared.codebook_size,
                "cached": prepared.cached,
            }
        except Exception as error:
            return self._failed(error)

    # Asked all the time: an event of Ray's for each would tell nobody anything.
    @ray.method(concurrency_group="control", enable_task_events=False)
    def drain(self, after_seq: int) -> Drained:
        """Records since ``after_seq``, and the heartbeat; see ``Recorder.drain``."""
        entries = self._recorder.drain(after_seq)
        progress = replace(self._recorder.progress(), memory_bytes=self._memory_bytes())
        return Drained(entries, progress, self._recorder.awaited())

    def _memory_bytes(self) -> int | None:
        if self._job is None:
            return None  # torch may be being imported
        import torch

        from ringworld_workers.metrics import memory_bytes

        found = memory_bytes(torch.device(self._job.device))
        return found["memory_device_bytes"] or found["memory_host_bytes"]

    @ray.method(concurrency_group="control")
    def request_stop(self) -> None:
        """Ask the stage to save and stop at its next step."""
        self._recorder.request_stop()

    @ray.method(concurrency_group="control")
    def examine(self) -> Examined:
        """What this worker does, and where in its code it is."""
        stacks = own_stacks(self._training_thread)
        return Examined(self._recorder.progress(), stacks, read_oom_kills())

    def _prepare_progress(self, name: str, done: int, total: int) -> None:
        self._recorder.phase(f"{name} {done}/{total}", done)

    def _failed(self, error: Exception) -> WorkerFailure:
        log.error("failed", exc_info=error)
        return WorkerFailure.of(error)


def export_seconds() -> float:
    """How often Ray exports metrics; it forgets a gauge that was not set for twice as long."""
    # As Ray's own exporter reads it: there is no public way.
    return max(1.0, float(ray._config.metrics_report_interval_ms()) / 1000.0)


def _named(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _spare_imports() -> None:
    """Keep DeepSpeed from loading what no worker uses: half of a gang's start, measured.

    Its autotuner imports MLflow where that is installed, and MLflow has one writer, which is not
    here. Its Muon optimizer decorates functions with ``torch.compile``, which loads all of
    inductor; nothing that we train is compiled.
    """
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # Python: "not installed"
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _log_to(recorder: Recorder) -> RecorderHandler:
    """Send this process's log to the outbox, and to stderr for Ray's own log files."""
    root, redact = logging.getLogger(), Redaction(os.environ)
    root.setLevel(logging.INFO)
    handler = RecorderHandler(recorder, redact)
    root.addHandler(handler)
    if not any(type(handler) is logging.StreamHandler for handler in root.handlers):
        root.addHandler(logging.StreamHandler(sys.stderr))
    for other in root.handlers:
        if type(other) is logging.StreamHandler:
            other.setFormatter(PlainFormatter(redact))
    return handler


# Ray's own annotations leave out concurrency groups.
RingWorkerActor = ray.remote(  # type: ignore[call-overload]
    max_restarts=0, concurrency_groups={"train": 1, "control": CONTROL_THREADS}
)(RingWorker)
