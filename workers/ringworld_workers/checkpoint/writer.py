"""Saves a checkpoint behind training's back: snapshot, upload in a thread, commit together."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ringworld_workers.checkpoint.catalog import prune, unreferenced
from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    CheckpointError,
    Manifest,
    StoredObject,
    folder_of,
    object_from_json,
    object_to_json,
    parameter_digest,
)
from ringworld_workers.checkpoint.layout import TrainState as TrainState
from ringworld_workers.checkpoint.snapshot import ChecksummedStream, Snapshot, SnapshotBuffer
from ringworld_workers.engine.base import Engine
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.base import Conflict, NotFound, Store, StoreError

log = logging.getLogger(__name__)

_PUT_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.5


@dataclass
class Upload:
    """One rank's part of a checkpoint on its way."""

    snapshot: Snapshot
    key: str
    stall_seconds: float
    thread: threading.Thread | None = None
    seconds: float = 0.0
    stored: StoredObject | None = None
    error: Exception | None = None


class CheckpointWriter:
    """Writes a run's checkpoints; at most one is in flight.

    ``snapshot`` and ``commit`` are called by every rank, on the train thread, in the same order;
    ``uploading``, ``poll`` and ``wait`` are local. Every save writes objects of new names, so a
    save that is cut short, repeated, or raced by a gang that should be dead, never touches an
    object of a committed checkpoint.
    """

    def __init__(self, store: Store, mesh: Mesh, job: StageJob) -> None:
        """Write to ``store``, as an attempt of ``job``."""
        self._store, self._mesh, self._job = store, mesh, job
        self._buffer = SnapshotBuffer()
        self._upload: Upload | None = None
        self._cleaner: threading.Thread | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a snapshot was taken that is not committed; the same on every rank."""
        return self._upload is not None

    def uploading(self) -> bool:
        """Whether this rank's part is still on its way."""
        return self._upload is not None and not self.poll()

    def poll(self) -> bool:
        """Whether this rank's part, if any, has arrived or failed."""
        thread = self._upload.thread if self._upload else None
        return thread is None or not thread.is_alive()

    def wait(self) -> None:
        """Wait until this rank's part has arrived or failed."""
        if self._upload and self._upload.thread:
            self._upload.thread.join()

    def snapshot(self, engine: Engine, state: TrainState) -> None:
        """Copy the state to host memory and start to upload it. Training waits for the copy only.

        Raises:
            RuntimeError: the checkpoint before is not committed.
        """
        if self._upload is not None:
            raise RuntimeError(
                f"the checkpoint of step {self._upload.snapshot.state.step} is in flight; commit "
                f"it before the snapshot of step {state.step}"
            )
        started = time.perf_counter()
        taken = self._buffer.take(engine, state)
        folder = folder_of(state.stage_index, state.stage, state.step)
        key = f"{folder}/rank-{self._mesh.rank:05d}-{uuid.uuid4().hex[:8]}.bin"
        self._upload = Upload(taken, key, stall_seconds=time.perf_counter() - started)
        self._upload.thread = threading.Thread(
            target=self._run, args=(self._upload,), name="checkpoint-upload", daemon=True
        )
        self._upload.thread.start()

    def _run(self, upload: Upload) -> None:
        started = time.perf_counter()
        try:
            stream = ChecksummedStream(upload.snapshot)
            _with_retries(lambda: self._store.put(upload.key, stream))
            upload.stored = stream.stored(upload.key)
        except Exception as error:  # whatever it is, commit tells every rank of it
            upload.error = error
        upload.seconds = time.perf_counter() - started

    def commit(self) -> dict[str, Any]:
        """Make the checkpoint in flight exist: rank 0 writes its manifest. A collective.

        Waits for this rank's own upload; call it when no rank is ``uploading`` to wait for none.

        Returns:
            ``step``, ``key`` (the folder), ``bytes`` (of all ranks), ``stall_seconds`` and
            ``upload_seconds`` (of the slowest rank); equal on every rank.

        Raises:
            RuntimeError: nothing is in flight.
            CheckpointError: a rank's upload or the manifest failed; nothing new is visible. It
                names the rank. The same on every rank.
        """
        if self._upload is None:
            raise RuntimeError("no checkpoint is in flight; take a snapshot first")
        self.wait()
        upload, self._upload = self._upload, None
        part = json.dumps(_part(upload)).encode()
        group = self._mesh.control_group
        parts: list[Any] | None = [None] * self._mesh.world_size if self._mesh.rank == 0 else None
        dist.gather_object(part, parts, dst=0, group=group)
        outcome: list[Any] = [None]
        if parts is not None:
            outcome[0] = self._finish(upload.snapshot, [json.loads(part) for part in parts])
        dist.broadcast_object_list(outcome, src=0, group=group)
        if "error" in outcome[0]:
            raise CheckpointError(outcome[0]["error"])
        return dict(outcome[0])

    def _finish(self, snapshot: Snapshot, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0: judge all parts and write the manifest."""
        state = snapshot.state
        folder = folder_of(state.stage_index, state.stage, state.step)
        failed = [f"rank {rank}: {p['error']}" for rank, p in enumerate(parts) if "error" in p]
        if failed:
            return {"error": f"checkpoint {folder} is not committed; " + "; ".join(failed)}
        manifest = Manifest(
            run_id=self._job.run_id,
            attempt=self._job.attempt,
            world_size=self._mesh.world_size,
            mesh={
                "sequence_parallel": self._mesh.sequence_parallel_size,
                "heads": self._mesh.heads_size,
                "data_parallel": self._mesh.data_parallel_size,
            },
            parameter_digest=parameter_digest(snapshot.shapes),
            tensors=snapshot.shapes,
            objects=tuple(object_from_json(part["object"]) for part in parts),
            optimizer=snapshot.optimizer,
            state=state,
        )
        try:
            _with_retries(lambda: publish(self._store, f"{folder}/{MANIFEST}", manifest))
        except (StoreError, CheckpointError) as error:
            return {"error": f"checkpoint {folder} is not committed; {error}"}
        self._clean(folder, {stored.key for stored in manifest.objects})
        return {
            "step": state.step,
            "key": folder,
            "bytes": sum(stored.size for stored in manifest.objects),
            "stall_seconds": max(part["stall_seconds"] for part in parts),
            "upload_seconds": max(part["upload_seconds"] for part in parts),
        }

    def _clean(self, folder: str, referenced: set[str]) -> None:
        """Remove what is no longer needed in a thread of rank 0; training does not wait for it."""
        if self._cleaner is not None and self._cleaner.is_alive():
            return
        # Listed while all ranks wait for this commit: a later save of the same step (a stage's
        # end) has put nothing into the folder yet.
        try:
            leftovers = unreferenced(self._store, folder, referenced)
        except StoreError as error:
            log.warning("leftovers of interrupted saves stay: %s", error)
            return
        self._cleaner = threading.Thread(
            target=_clean_quietly,
            args=(self._store, self._job.spec.checkpoint.keep, leftovers),
            name="checkpoint-clean-up",
            daemon=True,
        )
        self._cleaner.start()

    def close(self) -> None:
        """Wait for the threads; a checkpoint in flight stays uncommitted."""
        self.wait()
        if self._cleaner is not None:
            self._cleaner.join()


def _part(upload: Upload) -> dict[str, Any]:
    """What a rank tells rank 0."""
    if upload.stored is None:
        return {"error": str(upload.error)}
    return {
        "object": object_to_json(upload.stored),
        "stall_seconds": upload.stall_seconds,
        "upload_seconds": upload.seconds,
    }


def publish(store: Store, key: str, manifest: Manifest) -> None:
    """Write a manifest, once all its objects are there.

    A manifest of the same step may exist: the very same one (the reply to an earlier try was lost)
    is accepted; one of this or an earlier attempt at the step is replaced, and its objects go.

    Raises:
        CheckpointError: a later attempt has committed this step: this gang should be dead.
        StoreError: the store failed.
    """
    data = manifest.to_json()
    if store.put_if_absent(key, data):
        return
    try:
        found, etag = store.get_with_etag(key)
    except NotFound as error:
        raise StoreError("publish", key, "it was removed meanwhile", transient=True) from error
    if found == data:
        return
    earlier = Manifest.from_json(found, key)
    if earlier.attempt > manifest.attempt:
        raise CheckpointError(
            f"{key} was written by attempt {earlier.attempt}, and this is attempt "
            f"{manifest.attempt}; a newer gang runs this job, stop this one"
        )
    try:
        store.put_if_match(key, data, etag)
    except Conflict as error:
        raise StoreError("publish", key, str(error), transient=True) from error
    for stored in earlier.objects:
        store.delete(stored.key)


def _with_retries(action: Callable[[], None]) -> None:
    """Try again after failures that may pass, with growing pauses."""
    for attempt in range(_PUT_ATTEMPTS):
        try:
            return action()
        except StoreError as error:
            if not error.transient or attempt == _PUT_ATTEMPTS - 1:
                raise
            time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)


def _clean_quietly(store: Store, keep: int, leftovers: list[str]) -> None:
    try:
        prune(store, keep)
        for key in leftovers:
            store.delete(key)
        store.remove_unfinished()
    except StoreError as error:
        log.warning("old checkpoints stay: %s", error)
