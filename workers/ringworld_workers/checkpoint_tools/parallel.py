"""Do many small things at once: in order, few of them begun, none left running. No torch here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    action: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    stop: threading.Event | None = None,
) -> Iterator[Result]:
    """The results of ``action`` for every item, in the order of the items.

    At most twice as many calls as workers are begun and not yet asked for, so that memory stays
    bounded whatever the number of items.

    Args:
        action: called from several threads.
        items: iterated by the caller's thread.
        workers: threads.
        stop: set when no more results are wanted, for calls that take long to look at.

    Raises:
        Whatever ``action`` raised first. Calls that have begun are waited for, others never begin.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="checkpoint-tool")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(action, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
