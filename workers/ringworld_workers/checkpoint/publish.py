"""Makes a checkpoint exist: its manifest, written once all its objects are there."""

from __future__ import annotations

from collections.abc import Iterable

from ringworld_workers.checkpoint.fence import TakenOver
from ringworld_workers.checkpoint.layout import CheckpointError, Manifest, StoredObject
from ringworld_workers.store.base import Conflict, NotFound, Store, StoreError

_TRIES = 4


def require_objects(store: Store, folder: str, objects: Iterable[StoredObject]) -> None:
    """See that all of a checkpoint is there, before its manifest says so.

    Each was written without an error; but a clean-up may have taken it for a leftover.

    Raises:
        StoreError: an object is absent or of another size, or the store failed.
    """
    sizes = {info.key: info.size for info in store.list(folder)}
    for stored in objects:
        if sizes.get(stored.key) != stored.size:
            raise StoreError(
                "commit",
                f"{store.url}/{stored.key}",
                f"holds {sizes.get(stored.key, 'no')} bytes instead of {stored.size} after it was "
                "written; something else writes or removes there",
            )


def publish(store: Store, key: str, manifest: Manifest) -> None:
    """Write a manifest, on condition that nothing newer is there.

    A manifest of the same step may be there: the very same one (the reply to an earlier try was
    lost) is accepted; one of this or an earlier attempt at the step, or one that cannot be read,
    is replaced. The objects of a replaced one are leftovers from then on.

    Raises:
        TakenOver: a later attempt, or another run, has committed this step: this gang should be
            dead.
        StoreError: the store failed, or others keep changing the manifest.
    """
    data = manifest.to_json()
    for _ in range(_TRIES):
        if store.put_if_absent(key, data):
            return
        try:
            found, etag = store.get_with_etag(key)
        except NotFound:
            continue
        if found == data:
            return
        _refuse_newer(found, key, manifest)
        try:
            store.put_if_match(key, data, etag)
            return
        except Conflict:  # another writer; or this very write, whose reply was lost
            continue
    raise StoreError("publish", key, "other writers keep changing it", transient=True)


def _refuse_newer(found: bytes, key: str, manifest: Manifest) -> None:
    try:
        earlier = Manifest.from_json(found, key)
    except CheckpointError:
        return
    if earlier.run_uid and manifest.run_uid and earlier.run_uid != manifest.run_uid:
        raise TakenOver(
            f"{key} is of another run (uid {earlier.run_uid}), not of this one (uid "
            f"{manifest.run_uid}); give the job another name, or checkpoint.store another place"
        )
    if earlier.attempt > manifest.attempt:
        raise TakenOver(
            f"{key} was written by attempt {earlier.attempt}, and this is attempt "
            f"{manifest.attempt}; a newer gang runs this job, stop this one"
        )
