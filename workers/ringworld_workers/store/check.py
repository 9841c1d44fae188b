"""Whether a store does what training will ask of it, tried out before training begins."""

from __future__ import annotations

import uuid
from contextlib import suppress

from ringworld_workers.store.base import Conflict, Store, StoreError


def check_store(store: Store) -> None:
    """Write, read, list and remove a small object, and see that conditional writes are such.

    Args:
        store: one of little patience: somebody waits for this.

    Raises:
        StoreError: what does not work, and what to do about it.
    """
    operation, key = "check_writable", f"write-test/{uuid.uuid4().hex}"
    try:
        problem = _problem(store, key, uuid.uuid4().bytes)
        store.delete(key)
    except StoreError as error:
        if not error.transient:  # else nothing answers, and somebody waits
            with suppress(StoreError):  # the one that came first tells what is wrong
                store.delete(key)
        reason = f"{error.operation}: {error.reason}"
        raise StoreError(
            operation, store.url, reason, transient=error.transient, attempts=error.attempts
        ) from error
    if problem is not None:
        raise StoreError(operation, store.url, problem)


def _problem(store: Store, key: str, data: bytes) -> str | None:
    if not store.put_if_absent(key, data):
        return "a new object's name was said to be taken"
    found, etag = store.get_with_etag(key)
    if found != data:
        return "a small object came back changed"
    if key not in [info.key for info in store.list(key.partition("/")[0])]:
        return "a small object is missing in the listing"
    kept = not store.put_if_absent(key, b"other")
    with suppress(Conflict):
        store.put_if_match(key, b"other", "0" * len(etag))
        kept = False
    if kept:
        return None
    return (
        "it ignores the conditions of writes (S3's If-None-Match and If-Match), so two runs could "
        "overwrite each other's checkpoints; use a newer version of the server, or another store"
    )
