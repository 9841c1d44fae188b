"""A ring of Ray actors: this process is its first rank, the actors do as it says."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import ray

from ringworld_workers.asked_ring import AskedRing

if TYPE_CHECKING:
    from ringworld_workers.generation.asker import Asker
    from ringworld_workers.generation.source import ModelSource

log = logging.getLogger(__name__)

_MEETING = timedelta(minutes=5)
_ECHO_SECONDS = 3.0
"""A broken connection is heard of before the end of the rank that broke it."""


class RingLost(RuntimeError):
    """A rank is gone; the message says which, and why as far as it is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingShape:
    """How a model is spread.

    Attributes:
        size: ranks.
        device: of each; on cuda each has a GPU of its own.
        dtype: auto, or a key of ``loading.DTYPES``.
        chunk: tokens of a pass over prompts.
        threads: of each rank on the CPU.
    """

    size: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "auto"
    chunk: int = 2048
    threads: int = 1

    @property
    def resources(self) -> dict[str, float]:
        """Of one rank, as Ray counts them."""
        return {"CPU": 1.0} | ({"GPU": 1.0} if self.device == "cuda" else {})


class Rank:
    """Any rank but the first."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._asker: Any = None
        self._loaded, self._ended = threading.Event(), threading.Event()
        self._why = ""

    @ray.method(concurrency_group="work")
    def load(self, source: ModelSource, shape: RingShape, rank: int, host: str, port: int) -> None:
        """Load the model and join the ring."""
        from ringworld_workers.rendezvous import join_rendezvous

        try:
            self._asker = _asker(
                source,
                shape,
                rank,
                lambda: join_rendezvous(host, port, shape.size, _MEETING),
                self._loaded.set,
            )
        except Exception as error:
            self._why = _first_line(error)
            self._loaded.set()
            raise

    @ray.method(concurrency_group="watch")
    def loaded(self) -> str:
        """Return when the weights are loaded, or cannot be; says why not."""
        self._loaded.wait()
        return self._why

    @ray.method(concurrency_group="work")
    def call(self, method: str, args: tuple[Any, ...]) -> None:
        """Do what the first rank does at the same time."""
        try:
            found = getattr(self._asker, method)(*args)
            if isinstance(found, Iterator):
                for _ in found:
                    pass
        except ValueError:
            pass  # the first rank has raised the same, and tells who asked
        except Exception:
            self._why = traceback.format_exc()
            self._ended.set()
            raise

    @ray.method(concurrency_group="watch")
    def stay(self) -> str:
        """Return when this rank cannot go on; says why."""
        self._ended.wait()
        return self._why


# Ray's own annotations leave out concurrency groups.
_RankActor = ray.remote(  # type: ignore[call-overload]
    max_restarts=0, concurrency_groups={"work": 1, "watch": 2}
)(Rank)


class RayRing(AskedRing):
    """Actors that hold a model each and share the cache with this process.

    They are placed in the placement group of the actor that makes them, and end with it.

    Attributes:
        asker: this process's part.
    """

    asker: Asker

    def __init__(
        self, source: ModelSource, shape: RingShape, on_lost: Callable[[Exception], None]
    ) -> None:
        """Start the actors, load the weights on all ranks, and let them meet.

        Args:
            source: of the model.
            shape: how it is spread.
            on_lost: told once when a rank is lost, from a thread of its own.

        Raises:
            RingLost: a rank ended while it was being started.
            RequestError, DataError, CheckpointError, StoreError, WeightsError: the model cannot be
                loaded.
        """
        from ringworld_workers.rendezvous import open_rendezvous

        resources = shape.resources
        self._closed = False
        self._lost: RingLost | None = None
        self._is_lost = threading.Event()
        self._on_lost = on_lost
        self._actors = [
            _RankActor.options(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0)).remote()
            for _ in range(1, shape.size)
        ]
        stays = [actor.stay.remote() for actor in self._actors]
        host = ray.util.get_node_ip_address()
        self._store, port = open_rendezvous(host, shape.size, _MEETING)
        loads = [
            actor.load.remote(source, shape, rank, host, port)
            for rank, actor in enumerate(self._actors, 1)
        ]
        try:
            self.asker = _asker(source, shape, 0, lambda: self._store, self._wait_for_all)
            ray.get(loads)
        except BaseException as error:
            self.close()
            if isinstance(error, ray.exceptions.RayError):
                raise RingLost(f"the ring could not be started: {_first_line(error)}") from error
            raise
        if stays:
            threading.Thread(target=self._watch, args=(stays,), name="ranks", daemon=True).start()

    def _tell(self, method: str, args: tuple[Any, ...]) -> None:
        for actor in self._actors:
            actor.call.remote(method, args)

    def close(self) -> None:
        """End the other ranks, whatever they are doing. May be called twice."""
        self._closed = True
        for actor in self._actors:
            ray.kill(actor)

    def _wait_for_all(self) -> None:
        """Until every rank has its weights. The meeting would wait minutes for one that is lost."""
        said = ray.get([actor.loaded.remote() for actor in self._actors])
        for rank, why in enumerate(said, 1):
            if why:
                raise RingLost(f"rank {rank} of the ring could not be started: {why}")

    def _loss(self) -> RingLost | None:
        heard = bool(self._actors) and self._is_lost.wait(_ECHO_SECONDS)
        return self._lost if heard else None

    def _watch(self, stays: list[Any]) -> None:
        ready, _ = ray.wait(stays, num_returns=1)
        if self._closed:
            return
        rank = stays.index(ready[0]) + 1
        try:
            why = ray.get(ready[0]).strip().splitlines()[-1]
        except ray.exceptions.RayError as error:
            why = _first_line(error)
        self._lost = RingLost(f"rank {rank} of the ring is lost ({why})")
        self._is_lost.set()
        self._on_lost(self._lost)


def _asker(
    source: ModelSource,
    shape: RingShape,
    rank: int,
    meeting: Callable[[], Any],
    together: Callable[[], None],
) -> Asker:
    from ringworld_workers.serving.rank import join_ring

    return join_ring(
        source,
        rank,
        shape.size,
        device=shape.device,
        dtype=shape.dtype,
        chunk=shape.chunk,
        threads=shape.threads,
        meeting=meeting,
        together=together,
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
