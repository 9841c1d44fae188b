"""Loads a checkpoint into any engine on any mesh: each rank reads the ranges that it owns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ringworld_workers.checkpoint.catalog import committed as committed
from ringworld_workers.checkpoint.catalog import newest as newest
from ringworld_workers.checkpoint.layout import (
    MANIFEST,
    CheckpointRef,
    DamagedCheckpoint,
    Manifest,
    TrainState,
)
from ringworld_workers.checkpoint.layout import CheckpointError as CheckpointError
from ringworld_workers.checkpoint.range_reader import RangeReader as RangeReader
from ringworld_workers.checkpoint.together import Failure, from_rank_0, raise_together
from ringworld_workers.engine.base import MOMENTS, Engine, OwnedRange
from ringworld_workers.mesh import Mesh
from ringworld_workers.store.base import NotFound, Store, StoreError

_MAX_MANIFEST_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Owner:
    """The run that a checkpoint must be of."""

    run_id: str
    run_uid: str
    """Empty: any run of that id."""


def read_manifest(store: Store, ref: CheckpointRef) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpoint: it is damaged.
        CheckpointError: it is absent, of another version, or the store refuses to give it.
        StoreError: the store does not answer; a later try may succeed.
    """
    key = f"{ref.key}/{MANIFEST}"
    return Manifest.from_json(_manifest_bytes(store, key), key)


def load(
    store: Store,
    ref: CheckpointRef,
    engine: Engine,
    mesh: Mesh,
    *,
    with_optimizer: bool,
    owner: Owner | None = None,
    own_groups: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> TrainState:
    """Bring an engine to a checkpoint's state. A collective.

    Every byte is checked against its checksum before it counts. If any rank fails, all raise; the
    engine must then load something else before it is used.

    Args:
        store: that holds the checkpoint.
        ref: which one.
        engine: of any kind, ZeRO stage and mesh, around the same parameters.
        mesh: of the engine.
        with_optimizer: load the optimizer's moments and hyper-parameters too; else only weights,
            and the optimizer starts afresh.
        owner: the run that must have written it; None: any.
        own_groups: of the optimizer's hyper-parameters keep the engine's, and load the moments.
        beat: called now and then while this rank's values arrive.

    Raises:
        DamagedCheckpoint: the manifest or an object is missing or damaged, or of another run; names
            the object, and the range where it is one.
        CheckpointError: the checkpoint is absent, or of another model or optimizer.
        StoreError: the store does not answer; a later try may succeed.
    """
    key = f"{ref.key}/{MANIFEST}"
    # One rank asks the store, so that all load the very same checkpoint.
    text = from_rank_0(lambda: _checked_manifest(store, ref, owner), mesh)
    manifest = Manifest.from_json(text.encode(), key)
    failure: Failure | None = None
    try:
        _require_same_parameters(manifest, engine, ref)
        if with_optimizer:
            _require_same_optimizer(manifest, engine, ref)
    except CheckpointError as error:
        failure = error
    raise_together(failure, mesh)
    source = RangeReader(store, manifest, first=mesh.rank / mesh.world_size)

    def fill(ranges: Sequence[OwnedRange]) -> None:
        failure: Failure | None = None
        try:
            source.read(ranges, beat)
        except (CheckpointError, StoreError) as error:
            failure = error
        raise_together(failure, mesh)

    optimizer = manifest.optimizer
    if own_groups:
        optimizer = replace(optimizer, groups=engine.optimizer_state().groups)
    engine.load_ranges(fill, optimizer if with_optimizer else None)
    return manifest.state


def _checked_manifest(store: Store, ref: CheckpointRef, owner: Owner | None) -> str:
    """A manifest's text, once it is known to be sound, of this run, and its objects to be whole."""
    key = f"{ref.key}/{MANIFEST}"
    sizes = {info.key: info.size for info in store.list(ref.key)}
    if sizes.get(key, 0) > _MAX_MANIFEST_BYTES:
        raise DamagedCheckpoint(
            f"{key} is damaged: it has {sizes[key]} bytes; a manifest has at most "
            f"{_MAX_MANIFEST_BYTES}"
        )
    data = _manifest_bytes(store, key)
    manifest = Manifest.from_json(data, key)
    if owner is not None:
        _require_owner(manifest, owner, key)
    for stored in manifest.objects:
        if stored.key not in sizes:
            raise DamagedCheckpoint(
                f"object {stored.key} is missing: there is no such object in {store.url}"
            )
        if sizes[stored.key] < stored.size:
            raise DamagedCheckpoint(
                f"object {stored.key} is truncated: it has {sizes[stored.key]} of {stored.size} "
                "bytes"
            )
    return data.decode()


def _manifest_bytes(store: Store, key: str) -> bytes:
    try:
        return store.get(key)
    except NotFound as error:
        raise CheckpointError(f"{key} cannot be read: {error}") from error
    except StoreError as error:
        if error.transient:
            raise
        raise CheckpointError(f"{key} cannot be read: {error}") from error


def _require_owner(manifest: Manifest, owner: Owner, key: str) -> None:
    """Runs of one name and another uid are another run's too."""
    another = manifest.run_id != owner.run_id
    if owner.run_uid and manifest.run_uid:
        another = another or manifest.run_uid != owner.run_uid
    if another:
        raise DamagedCheckpoint(
            f"{key} is the manifest of another run: of {manifest.run_id} "
            f"({manifest.run_uid or 'no uid'}), and this is {owner.run_id} "
            f"({owner.run_uid or 'no uid'}); a run starts from another's weights by model.init_from"
        )


def _require_same_parameters(manifest: Manifest, engine: Engine, ref: CheckpointRef) -> None:
    held, wanted = manifest.tensors, engine.parameter_shapes()
    if held == wanted:
        return
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise CheckpointError(
                f"checkpoint {ref.key} is of another model: parameter {name} is "
                f"{held.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in the model; "
                "use the model that it was saved from"
            )


def _require_same_optimizer(manifest: Manifest, engine: Engine, ref: CheckpointRef) -> None:
    held, wanted = manifest.optimizer, engine.optimizer_state()
    if held.name != wanted.name:
        raise CheckpointError(
            f"checkpoint {ref.key} holds the state of {held.name}, the job uses {wanted.name}; "
            "load its weights only, or use the same optimizer"
        )
    kinds = {found.kind for stored in manifest.objects for found in stored.ranges}
    if held.name == "adamw" and not kinds.issuperset(MOMENTS):
        raise DamagedCheckpoint(f"checkpoint {ref.key} is of adamw, but holds no moments")
