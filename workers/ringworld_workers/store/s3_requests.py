"""Requests to one bucket: a client of this process, watched and tried again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ringworld_workers.store import s3_client
from ringworld_workers.store.base import StoreError
from ringworld_workers.store.retry import Effort, Passing, Patience, Watch
from ringworld_workers.store.s3_client import PreconditionFailed

Result = TypeVar("Result")


class Requests:
    """Makes a store's requests. Threads share it; after a fork the child connects anew."""

    def __init__(self, url: str, patience: Patience) -> None:
        """Name the store for errors; nothing is contacted yet."""
        self.url, self.patience = url, patience
        self._lock = threading.Lock()
        self._client: Any = None
        self._process = 0

    def effort(self, operation: str, key: str, patience: Patience | None = None) -> Effort:
        """A call that begins now, with the store's patience or one of its own."""
        name = f"{self.url}/{key}" if key else self.url
        return Effort(operation, name, patience or self.patience)

    def run(
        self,
        effort: Effort,
        request: Callable[[Any, Watch], Result],
        reply_seconds: float | None = None,
    ) -> Result:
        """Make a request until it works.

        Args:
            effort: the call that it is part of.
            request: gets boto3's client, and the watch that it tells of bytes.
            reply_seconds: for a reply, where not the usual.

        Raises:
            PreconditionFailed: the object is other than the request's condition says.
            NotFound: there is no such object.
            StoreError: it is refused, or patience has ended.
        """

        def attempt(watch: Watch) -> Result:
            client = self._connected(effort)
            effort.silence = f"no reply in time {s3_client.where(client)}"
            try:
                return request(client, watch)
            except (StoreError, Passing, PreconditionFailed):
                raise
            except Exception as error:
                translated = s3_client.translate(error, effort.operation, effort.name, client)
                raise translated from error

        return effort.run_watched(attempt, reply_seconds)

    def _connected(self, effort: Effort) -> Any:
        with self._lock:
            if self._process != os.getpid():  # a fork shares sockets with its parent
                self._client = s3_client.connect(self.patience, effort.operation, effort.name)
                self._process = os.getpid()
            return self._client
