"""Saves a checkpoint behind training's back: snapshot, upload in a thread, commit together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ringworld_workers.checkpoint.background import Background
from ringworld_workers.checkpoint.exchange import all_gather_json, broadcast_json, gather_json
from ringworld_workers.checkpoint.fence import Fence, TakenOver
from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    CheckpointError,
    Manifest,
    OptimizerState,
    StateNotFinite,
    StoreAway,
    folder_of,
    object_from_json,
    object_to_json,
    parameter_digest,
)
from ringworld_workers.checkpoint.layout import TrainState as TrainState
from ringworld_workers.checkpoint.publish import publish, require_objects
from ringworld_workers.checkpoint.retention import prune
from ringworld_workers.checkpoint.save_id import SaveId
from ringworld_workers.checkpoint.snapshot import SnapshotBuffer, share_bytes
from ringworld_workers.checkpoint.together import from_rank_0
from ringworld_workers.checkpoint.upload import Upload, upload_pieces, upload_snapshot
from ringworld_workers.engine.base import Engine
from ringworld_workers.mesh import Mesh
from ringworld_workers.stage_job import StageJob
from ringworld_workers.store.base import Store, StoreError

log = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
_MIB = 2**20
# By the name under which they travel to the other ranks; of several, the first is told.
_ERRORS: dict[str, type[CheckpointError]] = {
    "taken over": TakenOver,
    "not finite": StateNotFinite,
    "other": CheckpointError,
    "away": StoreAway,
}


@dataclass
class Save:
    """A checkpoint on its way: this rank's part, and on rank 0 the manifest."""

    id: SaveId
    folder: str
    state: TrainState
    optimizer: OptimizerState
    shapes: dict[str, tuple[int, ...]]
    upload: Upload
    stall_seconds: float = 0.0
    waited_seconds: float = 0.0
    gathered: bool = False
    """Whether all ranks' parts have arrived, and the manifest's turn has come."""
    commit: Background[dict[str, Any]] | None = None
    """On rank 0."""


class CheckpointWriter:
    """Writes a run's checkpoints; at most one is in flight.

    ``open``, ``prepare``, ``snapshot``, ``advance`` and ``commit`` are collectives, called on the
    train thread in the same order by every rank; ``uploading`` and ``wait`` are local. No call
    but ``commit`` waits for the store, unless ``max_host_bytes`` is less than a rank's share.
    """

    def __init__(
        self, store: Store, mesh: Mesh, job: StageJob, *, beat: Callable[[], None] | None = None
    ) -> None:
        """Write to ``store``, as an attempt of ``job``.

        Args:
            store: of the run.
            mesh: of the engine.
            job: whose spec says what is kept.
            beat: called about every second while training waits for the store.
        """
        self._store, self._mesh, self._job = store, mesh, job
        self._beat = beat or (lambda: None)
        self._buffer = SnapshotBuffer(job.spec.checkpoint.max_host_bytes)
        self._fence: Fence | None = None
        self._token = ""
        self._piecewise: bool | None = None
        self._num_saves = 0
        self._save: Save | None = None
        self._cleaner: Background[None] | None = None

    # --- before the first step ---

    def open(self) -> None:
        """Become the gang that writes: see ``Fence.take``. Once; later calls do nothing.

        Raises:
            TakenOver: another gang writes this run.
            CheckpointError: what says who writes is damaged.
            StoreError: the store failed. All on every rank.
        """
        if self._token:
            return
        self._token = from_rank_0(self._take, self._mesh)

    def _take(self) -> str:
        job = self._job
        fence = Fence(
            self._store, run_uid=job.run_uid, attempt=job.attempt, stage_index=job.stage_index
        )
        fence.take()
        self._fence = fence
        return fence.record.token

    def prepare(self, engine: Engine) -> str | None:
        """Have the host memory of snapshots ready, so that the first one is as quick as any.

        Returns:
            On every rank, what the user should know: that saves will be slow, and why; or None.
        """
        ranges = engine.owned_ranges()
        self._buffer.prepare(ranges)
        share = share_bytes(ranges)
        found = all_gather_json([self._buffer.fits(ranges), share], self._mesh)
        self._piecewise = not all(fits for fits, _ in found)
        limit = self._job.spec.checkpoint.max_host_bytes
        if not self._piecewise or limit is None:
            return None
        most = max(share for _, share in found)
        return (
            f"a worker's share of the state is {most / _MIB:.1f} MiB, and checkpoint."
            f"max_host_bytes is {limit / _MIB:.1f} MiB: each save goes through that piece by piece "
            f"({-(-most // limit)} of them), and the step waits for the whole upload; to save in "
            f"the background, give at least {most}"
        )

    # --- saving ---

    @property
    def in_flight(self) -> bool:
        """Whether a snapshot was taken that is not committed; the same on every rank."""
        return self._save is not None

    def uploading(self) -> bool:
        """Whether this rank still works on the checkpoint in flight."""
        save = self._save
        if save is None:
            return False
        return save.upload.busy or (save.commit is not None and save.commit.busy)

    def wait(self) -> None:
        """Wait until this rank has done, or failed, what it works on, the clean-up too."""
        if self._save is not None:
            self._save.upload.wait()
            if self._save.commit is not None:
                self._save.commit.wait()
        if self._cleaner is not None:
            self._cleaner.wait()

    def snapshot(self, engine: Engine, state: TrainState) -> None:
        """Copy the state to host memory and start to upload it. Training waits for the copy only.

        Where host memory is too small for that, it waits for the upload too.

        Raises:
            RuntimeError: the checkpoint before is not committed.
            TakenOver, CheckpointError, StoreError: see ``open``, if it was not called before.
        """
        if self._save is not None:
            raise RuntimeError(
                f"the checkpoint of step {self._save.state.step} is in flight; commit "
                f"it before the snapshot of step {state.step}"
            )
        self.open()
        if self._piecewise is None:
            self.prepare(engine)
        started = time.perf_counter()
        ranges = engine.owned_ranges()
        self._num_saves += 1
        save_id = SaveId(self._token, self._num_saves)
        folder = folder_of(state.stage_index, state.stage, state.step)
        upload = upload_pieces if self._piecewise else upload_snapshot
        save = self._save = Save(
            id=save_id,
            folder=folder,
            state=state,
            optimizer=engine.optimizer_state(),
            shapes=engine.parameter_shapes(),
            upload=upload(self._store, self._buffer, ranges, save_id, folder, self._mesh.rank),
        )
        if self._piecewise:
            self._await_all()
        save.stall_seconds = time.perf_counter() - started

    def advance(self) -> dict[str, Any] | None:
        """Take the checkpoint in flight one step on. Call it when no rank is ``uploading``.

        First the ranks' parts come together, and rank 0 starts to write the manifest; next time
        its outcome is told.

        Returns:
            None as long as there is no outcome; then see ``commit``.

        Raises:
            RuntimeError: nothing is in flight.
            CheckpointError: see ``commit``.
        """
        save = self._save
        if save is None:
            raise RuntimeError("no checkpoint is in flight; take a snapshot first")
        if not save.gathered:
            parts = gather_json(_part(save), self._mesh)
            save.gathered = True
            if parts is not None:
                save.commit = Background("checkpoint-commit", lambda: self._finish(save, parts))
            return None
        outcome: dict[str, Any] = {}
        if save.commit is not None:
            try:
                outcome = save.commit.result | {"waited_seconds": save.waited_seconds}
            except Exception as error:  # whatever it is, every rank is told
                outcome = _told(error)
        outcome = broadcast_json(outcome, self._mesh)
        self._save = None
        if "error" in outcome:
            text = f"checkpoint {save.folder} is not committed; {outcome['error']}"
            raise _ERRORS[outcome["type"]](text)
        if self._fence is not None:
            self._clean(self._fence, save.id)
        return outcome

    def commit(self) -> dict[str, Any]:
        """Make the checkpoint in flight exist: rank 0 writes its manifest. Waits for the store.

        Returns:
            ``step``, ``key`` (the folder), ``bytes`` (of all ranks), ``stall_seconds``,
            ``upload_seconds`` (both of the slowest rank), ``bytes_per_second`` of the upload, and
            ``waited_seconds`` that training has stood still in this call; equal on every rank.

        Raises:
            RuntimeError: nothing is in flight.
            TakenOver: another gang writes this run by now; this one must stop.
            CheckpointError: a rank's upload or the manifest failed; nothing new is visible. It
                names the rank. The same on every rank.
        """
        while True:
            if self._save is None:
                raise RuntimeError("no checkpoint is in flight; take a snapshot first")
            started = time.perf_counter()
            self._await_all()
            self._save.waited_seconds += time.perf_counter() - started
            outcome = self.advance()
            if outcome is not None:
                return outcome

    def close(self) -> None:
        """Wait for the threads; a checkpoint in flight stays uncommitted."""
        self.wait()
        if self._fence is not None:
            self._fence.release()
            self._fence = None

    def _await_all(self) -> None:
        """Wait until no rank is uploading, in short collectives: uploads may outlast a timeout."""
        while self._save is not None:
            for work in (self._save.upload, self._save.commit):
                if work is not None and work.busy:
                    work.wait(_BEAT_SECONDS)
            busy = torch.tensor([int(self.uploading())])
            dist.all_reduce(busy, group=self._mesh.control_group)
            if not busy:
                return
            self._beat()

    def _finish(self, save: Save, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """On rank 0: judge all parts and write the manifest."""
        failed = [f"rank {rank}: {p['error']}" for rank, p in enumerate(parts) if "error" in p]
        if failed:
            types = {part["type"] for part in parts if "error" in part}
            raise next(_ERRORS[kind] for kind in _ERRORS if kind in types)("; ".join(failed))
        mesh, job = self._mesh, self._job
        manifest = Manifest(
            run_id=job.run_id,
            run_uid=job.run_uid,
            attempt=job.attempt,
            world_size=mesh.world_size,
            mesh={
                "sequence_parallel": mesh.sequence_parallel_size,
                "heads": mesh.heads_size,
                "data_parallel": mesh.data_parallel_size,
            },
            parameter_digest=parameter_digest(save.shapes),
            tensors=save.shapes,
            objects=tuple(object_from_json(o) for part in parts for o in part["objects"]),
            optimizer=save.optimizer,
            state=save.state,
        )
        require_objects(self._store, save.folder, manifest.objects)
        if self._fence is not None:
            self._fence.check()
        publish(self._store, f"{save.folder}/{MANIFEST}", manifest)
        num_bytes = sum(stored.size for stored in manifest.objects)
        upload_seconds = max(part["upload_seconds"] for part in parts)
        return {
            "step": save.state.step,
            "key": save.folder,
            "bytes": num_bytes,
            "stall_seconds": max(part["stall_seconds"] for part in parts),
            "upload_seconds": upload_seconds,
            "bytes_per_second": num_bytes / upload_seconds,
        }

    def _clean(self, fence: Fence, last: SaveId) -> None:
        """Remove what is no longer needed in a thread of rank 0; training does not wait for it."""
        if self._cleaner is not None and self._cleaner.busy:
            return
        wanted = self._job.spec.checkpoint

        def clean() -> None:
            try:
                # A gang that was taken over must not touch what its successor writes.
                fence.check()
                prune(
                    self._store,
                    wanted.keep,
                    wanted.keep_stage_ends,
                    unfinished_seconds=wanted.abort_unfinished_after,
                    last=last,
                )
            except (StoreError, CheckpointError) as error:
                log.warning("old checkpoints stay: %s", error)

        self._cleaner = Background("checkpoint-clean-up", clean)


def _part(save: Save) -> dict[str, Any]:
    """What a rank tells rank 0."""
    try:
        objects = [object_to_json(stored) for stored in save.upload.result]
    except Exception as error:  # whatever it is, every rank is told
        return _told(error)
    return {
        "objects": objects,
        "stall_seconds": save.stall_seconds,
        "upload_seconds": save.upload.seconds,
    }


def _told(error: Exception) -> dict[str, Any]:
    """An error, as it travels to the other ranks."""
    known = isinstance(error, StoreError | CheckpointError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return {"error": text, "type": _type_of(error)}


def _type_of(error: Exception) -> str:
    if isinstance(error, StoreError):
        return "away" if error.transient else "other"
    named = (name for name, kind in _ERRORS.items() if type(error) is kind)
    return next(named, "other")
