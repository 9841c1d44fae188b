"""What a run has in its store: committed checkpoints, and what never became one. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from ringworld_workers.checkpoint.catalog import refs_in
from ringworld_workers.checkpoint.layout import MANIFEST, CheckpointError, CheckpointRef, Manifest
from ringworld_workers.checkpoint.retention import Removable, leftovers
from ringworld_workers.checkpoint_tools.choose import NoSuchCheckpoint, manifest_of, stage_folder
from ringworld_workers.checkpoint_tools.parallel import in_parallel
from ringworld_workers.store.base import Store

_READERS = 8


@dataclass(frozen=True)
class CheckpointEntry:
    """A committed checkpoint."""

    ref: CheckpointRef
    committed: float
    """When its manifest was written, in seconds since the epoch; 0 where the store cannot tell."""
    manifest: Manifest | None
    problem: str = ""
    """Why there is no manifest to show."""

    @property
    def size(self) -> int:
        """Bytes of its objects, as the manifest says."""
        return sum(stored.size for stored in self.manifest.objects) if self.manifest else 0


@dataclass(frozen=True)
class Listing:
    """All that a run has."""

    entries: tuple[CheckpointEntry, ...]
    """Oldest first."""
    leftovers: tuple[Removable, ...]
    """What is part of none of them, oldest first."""


def read_listing(store: Store, stage: str = "", step: int | None = None) -> Listing:
    """List a run's checkpoints, with what their manifests say.

    Args:
        store: the run's checkpoints.
        stage: only this one, by its name or its folder's; empty: all.
        step: only this one.

    Raises:
        StoreError: the store failed. A manifest that cannot be read is no error.
    """
    infos = store.list()
    written = {info.key: info.modified for info in infos}
    refs = [
        ref
        for ref in refs_in(store.url, infos)
        if (step is None or ref.step == step) and stage in ("", ref.stage, stage_folder(ref.key))
    ]

    def read(ref: CheckpointRef) -> CheckpointEntry | None:
        moment = written[f"{ref.key}/{MANIFEST}"]
        try:
            return CheckpointEntry(ref, moment, manifest_of(store, ref))
        except NoSuchCheckpoint:  # removed since it was listed
            return None
        except CheckpointError as error:
            return CheckpointEntry(ref, moment, None, str(error))

    entries = tuple(entry for entry in in_parallel(read, refs, _READERS) if entry)
    # Not every store knows which checkpoint an unfinished upload was for.
    spare = leftovers(store) if not stage else []
    return Listing(entries, tuple(spare))
