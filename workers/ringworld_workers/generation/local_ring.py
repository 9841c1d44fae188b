"""A ring of processes on this machine: this one is its first rank, the others do as it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ringworld_model.decode import DEFAULT_CHUNK
from ringworld_workers.asked_ring import AskedRing
from ringworld_workers.generation.asker import make_asker
from ringworld_workers.generation.coder import Coder
from ringworld_workers.generation.loading import choose_device
from ringworld_workers.generation.source import ModelSource, RequestError
from ringworld_workers.rendezvous import join_rendezvous, open_rendezvous

_GRACE_SECONDS, _ECHO_SECONDS = 5.0, 0.5
_HOST, _MEETING = "127.0.0.1", timedelta(minutes=5)
"""Where the ranks meet: a port leaves nothing behind when all of them are killed, as files would.
"""
_READY = "ready"


OutOfMemory = torch.OutOfMemoryError
"""For who shows errors and does without torch."""


class RingError(RuntimeError):
    """A rank of the ring is lost; the message says why, as far as it is known."""


class LocalRing(AskedRing):
    """Ranks that hold a model each and share the cache. A context manager."""

    def __init__(
        self,
        source: ModelSource,
        *,
        size: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        coder: Coder | None = None,
        chunk: int = DEFAULT_CHUNK,
        on_tensor: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Say what the ring is to be; nothing is started yet.

        Args:
            source: of the model.
            size: ranks; each takes the memory of the whole model.
            device: auto, cpu or cuda; on cuda each rank has a GPU of its own.
            dtype: auto, or a key of ``loading.DTYPES``.
            coder: the model's, if it is loaded already.
            chunk: tokens of a prefill pass.
            on_tensor: told how the first rank's weights are read.

        Raises:
            RequestError: the machine has fewer GPUs than the ring has ranks, or none.
        """
        chosen = choose_device(device)
        gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
        if chosen.type == "cuda" and gpus < size:
            raise RequestError(
                f"a ring of {size} on {chosen.type} needs {size} GPUs, and this machine has "
                f"{gpus}; take a smaller --ring, or --device cpu"
            )
        self._source, self._size, self._chunk = source, size, chunk
        self._device, self._dtype = chosen.type, dtype
        self._coder, self._on_tensor = coder, on_tensor
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: dist.Store | None = None

    def __enter__(self) -> LocalRing:
        """Start the other ranks, load the weights on all of them, and join.

        Raises:
            RequestError, DataError, CheckpointError, StoreError, WeightsError: the model cannot be
                loaded.
            RingError: a rank ended while it was being started.
        """
        try:
            if self._size > 1:
                self._store, port = open_rendezvous(_HOST, self._size, _MEETING)
                self._start(port)
                _limit_threads(self._size)
            self.asker = make_asker(
                self._source,
                0,
                self._size,
                _place(self._device, 0),
                self._dtype,
                self._chunk,
                self._meeting,
                coder=self._coder,
                on_tensor=self._on_tensor,
                together=self._wait_for_all,
            )
        except BaseException as error:
            known = not isinstance(error, RuntimeError) or isinstance(error, RingError)
            lost = None if known else self._loss()
            self.close()
            if lost is not None:
                raise lost from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the other ranks."""
        self.close()

    def _tell(self, method: str, args: tuple[Any, ...]) -> None:
        for pipe in self._pipes:
            pipe.send((method, args))

    def close(self) -> None:
        """End the other ranks, whatever they are doing. May be called twice."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_GRACE_SECONDS)
        if self._size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        self._pipes, self._processes, self._store = [], [], None

    def _meeting(self) -> dist.Store:
        assert self._store is not None  # opened where there are several ranks
        return self._store

    def _start(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        told = (self._source, self._size, self._device, self._dtype, self._chunk)
        with _interrupts_held():
            for rank in range(1, self._size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, there, *told, port), daemon=True
                )
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)

    def _wait_for_all(self) -> None:
        """Until every rank has its weights. The rendezvous would wait for one that is lost."""
        for rank, pipe in enumerate(self._pipes, 1):
            try:
                said = pipe.recv()
            except EOFError:
                raise RingError(f"rank {rank} of the ring ended while it was started") from None
            if said != _READY:
                raise RingError(f"rank {rank} of the ring: {said}")

    def _loss(self) -> RingError | None:
        """Which rank is gone, and why; None: all are there.

        The ranks beside a lost one end with it, as their connections do: it is the one that was
        killed, or else the one that says something other than that.
        """
        sentinels = [process.sentinel for process in self._processes]
        if not sentinels or not wait(sentinels, _GRACE_SECONDS):
            return None
        found = []
        for rank, (process, pipe) in enumerate(zip(self._processes, self._pipes, strict=True), 1):
            process.join(_ECHO_SECONDS)
            if process.exitcode is None:
                continue
            said = ""
            try:
                if pipe.poll():
                    said = str(pipe.recv()).strip()
            except (EOFError, OSError):
                pass
            last = said.splitlines()[-1] if said else ""
            found.append((process.exitcode == 1, "onnection" in last, rank, last, said))
        _, _, rank, last, said = min(found)
        code = self._processes[rank - 1].exitcode
        why = f": {last}" if last else ""
        lost = RingError(f"rank {rank} of the ring ended (exit code {code}){why}")
        lost.add_note(said)
        return lost


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that never see Ctrl-C: this one ends them."""
    # Its first start would unblock the signal again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _limit_threads(size: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))


def _place(device: str, rank: int) -> torch.device:
    return torch.device(device, rank) if device == "cuda" else torch.device(device)


def _serve(
    rank: int,
    pipe: Connection,
    source: ModelSource,
    size: int,
    device: str,
    dtype: str,
    chunk: int,
    port: int,
) -> None:
    """Another rank: do what the first one says, until it is gone."""
    _limit_threads(size)
    try:
        asker = make_asker(
            *(source, rank, size, _place(device, rank), dtype, chunk),
            lambda: join_rendezvous(_HOST, port, size, _MEETING),
            together=lambda: pipe.send(_READY),
        )
        while True:
            try:
                method, args = pipe.recv()
            except EOFError:
                os._exit(0)
            try:
                found = getattr(asker, method)(*args)
                if isinstance(found, Iterator):
                    for _ in found:
                        pass
            except ValueError:
                # The first rank has raised the same, and tells its caller.
                continue
    except BaseException:
        try:
            pipe.send(traceback.format_exc())
        except OSError:
            pass
        # A tidy end would wait for peers that may be gone.
        os._exit(1)
