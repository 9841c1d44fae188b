"""One model behind the endpoint: loading, ready, or failed; and how many may come in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ringworld_platform.serving.api_errors import ApiError
from ringworld_platform.serving.asking import Asking
from ringworld_platform.serving.metrics import Metrics
from ringworld_platform.serving.settings import ServeSettings

if TYPE_CHECKING:
    from ringworld_workers.serving import Engine, Ring

log = logging.getLogger(__name__)

_THREADS, _MEDIA_THREADS = 4, 2
"""That make prompts; models of a million tokens have some that take seconds, and media longer."""
_RETRY_SECONDS, _LOADING_RETRY_SECONDS = 1, 5


class Service:
    """What the routes work on.

    Attributes:
        settings: names and limits.
        metrics: figures.
        threads: in which prompts of text are made.
        media_threads: in which those are made that hold media: no text waits for a film.
        said: while the model is loaded, how far it is; why it failed.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Serve nothing yet."""
        self.settings, self.metrics = settings, Metrics()
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prompt")
        self.media_threads = ThreadPoolExecutor(_MEDIA_THREADS, thread_name_prefix="media")
        self.said = "the ring is being started"
        self._inside = 0
        self._engine: Engine | None = None
        self._asking: Asking | None = None
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._closed = False
        gauge = self.metrics.gauge
        gauge("running", "Requests that are being answered.", lambda: self._of("running"))
        gauge("waiting", "Requests that wait for a row.", lambda: self._of("waiting"))
        gauge("inside", "Requests that are not at their end.", lambda: float(self._inside))
        gauge("cache_bytes", "Keys and values on the first rank.", lambda: self._of("held_bytes"))
        gauge("cache_tokens", "Tokens that are set aside.", lambda: self._of("held_tokens"))
        gauge("ready", "1: requests are answered.", lambda: float(self.state == "ready"))

    @property
    def state(self) -> Literal["loading", "ready", "failed"]:
        """Whether requests are answered."""
        if self.failure is not None:
            return "failed"
        return "loading" if self._engine is None else "ready"

    @property
    def failure(self) -> Exception | None:
        """Why nothing will be answered any more, by this process."""
        return self._error or (self._engine.failure if self._engine is not None else None)

    def load(self, make_ring: Callable[[], Ring]) -> None:
        """Load the model in a thread of its own; requests are refused with 503 until it is there.

        Args:
            make_ring: starts the ring, its weights loaded.
        """
        threading.Thread(target=self._load, args=(make_ring,), name="load", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """End all requests: the ring is lost."""
        if self._engine is not None:
            self._engine.fail(error)
        elif self._error is None:
            self._error = error

    def close(self) -> None:
        """End all requests and the ring."""
        with self._lock:
            self._closed = True
            engine = self._engine
        if engine is not None:
            engine.close()
        for pool in (self.threads, self.media_threads):
            pool.shutdown(wait=False, cancel_futures=True)

    def ready(self) -> tuple[Engine, Asking]:
        """What answers.

        Raises:
            ApiError: 503, it is not there yet, or no longer.
        """
        failure = self.failure
        if failure is not None:
            raise ApiError(
                503,
                f"the model is not served: {failure}; it is started anew",
                code="ring_lost",
                retry_after=_LOADING_RETRY_SECONDS,
            )
        if self._engine is None or self._asking is None:
            raise ApiError(
                503,
                f"the model is being loaded: {self.said}",
                code="loading",
                retry_after=_LOADING_RETRY_SECONDS,
            )
        return self._engine, self._asking

    @contextmanager
    def place(self) -> Iterator[None]:
        """A request's place, from before its body is read to its end.

        Raises:
            ApiError: 429, there is none.
        """
        limit = self.settings.max_concurrent + self.settings.max_queue
        with self._lock:
            if self._inside >= limit:
                raise ApiError(
                    429,
                    f"{limit} requests are being answered or wait; try again later",
                    code="too_many_requests",
                    retry_after=_RETRY_SECONDS,
                )
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1

    def _load(self, make_ring: Callable[[], Ring]) -> None:
        from ringworld_workers.serving import Engine, cache_room

        try:
            ring = make_ring()
            settings = self.settings
            room = settings.cache_tokens or cache_room(ring.asker)
            asking = Asking(ring.asker.loaded, settings)
            engine = Engine(ring, max_rows=settings.max_concurrent, cache_tokens=room)
        # Whatever it was: who asks must hear of it.
        except Exception as error:
            log.exception("the model cannot be loaded")
            self._error = error
            return
        with self._lock:
            self._asking, self._engine = asking, engine
            closed = self._closed
        if closed:
            engine.close()

    def _of(self, name: str) -> float:
        found: Any = getattr(self._engine, name) if self._engine is not None else 0
        return float(found)
