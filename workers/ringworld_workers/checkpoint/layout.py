"""What a checkpoint is on the store: one object a rank, and the manifest that makes them one.

``<stage_index>-<stage>/step-<step>/`` holds ``rank-<rank>-<id>.bin`` and ``manifest.json``. The
manifest is written last; without it the checkpoint does not exist. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from ringworld_workers.checkpoint.manifest_checks import DTYPES, check_manifest

FORMAT = "ringworld-checkpoint"
VERSION = 3
CHUNK_BYTES = 1024 * 1024
"""Each range has a checksum for every so many bytes, so that a part of it can be read verified."""
MANIFEST = "manifest.json"
SET_ASIDE = "manifest.damaged.json"
"""What the manifest of a checkpoint is called once it was found damaged."""
_NO_DIGEST = "0" * 64
_FOLDER = re.compile(r"^(\d{2,})-(.+)/step-(\d{8,})$")


class CheckpointError(RuntimeError):
    """A checkpoint is absent, damaged, or of another model; the message names the object."""


class DamagedCheckpoint(CheckpointError):
    """A committed checkpoint that can never be loaded again, though an older one may.

    A flipped byte, a truncated or missing object, a manifest that cannot be read or is of another
    run; not a store that cannot be reached. The message names object and byte range.
    """


class StoreAway(CheckpointError):
    """The store did not answer, for longer than a call tries again; it may come back."""


class StateNotFinite(CheckpointError):
    """What was to be saved holds NaN or Inf; it is not committed. The message names a tensor."""

    step = 0
    """After which the state was that; 0 where that is not known."""


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint, by place."""

    url: str
    """Of the store that holds it."""
    stage: str
    stage_index: int
    step: int
    key: str
    """Its folder in the store."""


@dataclass(frozen=True)
class TrainState:
    """Where training stands: all that a resume needs besides tensors."""

    stage: str
    stage_index: int
    step: int
    """Optimizer steps done in the stage."""
    tokens: int
    """Tokens consumed by the job."""
    cursor: int
    """The stage's next global row."""
    rng: Any
    """State of the random generators, as plain JSON."""
    learning_rate: float
    """Of the last step done; of the stage's first where none is."""
    spec_digest: str
    metrics: dict[str, float]
    final: bool
    """Whether the stage is finished."""
    bookmark: Any = None
    """From where the row plan is continued, as plain JSON; without one it is replayed."""


@dataclass(frozen=True)
class GroupState:
    """Hyper-parameters of one parameter group."""

    name: str
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class OptimizerState:
    """What the optimizer knows besides its tensors."""

    name: str
    """adamw or sgd."""
    step: int
    """Adam's step count, for its bias correction."""
    groups: tuple[GroupState, ...]


@dataclass(frozen=True, slots=True)
class StoredRange:
    """A run of one logical tensor's elements, as it lies in an object."""

    tensor: str
    kind: str
    start: int
    """First element, in row-major order of the whole tensor."""
    numel: int
    offset: int
    """First byte in the object."""
    length_bytes: int
    dtype: str
    crc32c: tuple[int, ...]
    """Checksum of each CHUNK_BYTES of the range, the last one shorter."""


@dataclass(frozen=True)
class StoredObject:
    """One rank's object."""

    key: str
    size: int
    ranges: tuple[StoredRange, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint without reading its tensors."""

    run_id: str
    attempt: int
    world_size: int
    mesh: dict[str, int]
    parameter_digest: str
    tensors: dict[str, tuple[int, ...]]
    """Shape of every parameter, by name."""
    objects: tuple[StoredObject, ...]
    optimizer: OptimizerState
    state: TrainState
    run_uid: str = ""
    """Of the run that wrote it: run ids are used again on other machines. Empty: unknown."""

    @property
    def folder(self) -> str:
        """Key of the checkpoint's folder."""
        return folder_of(self.state.stage_index, self.state.stage, self.state.step)

    def to_json(self) -> bytes:
        """Canonical bytes: equal manifests are equal bytes.

        Raises:
            ValueError: an object lies outside of the checkpoint's folder.
        """
        names = sorted(self.tensors)
        ranges = [found for stored in self.objects for found in stored.ranges]
        kinds = sorted({found.kind for found in ranges})
        content = {
            "format": FORMAT,
            "version": VERSION,
            "chunk_bytes": CHUNK_BYTES,
            "run_id": self.run_id,
            "run_uid": self.run_uid,
            "attempt": self.attempt,
            "world_size": self.world_size,
            "mesh": self.mesh,
            "parameter_digest": self.parameter_digest,
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "kinds": kinds,
            "dtypes": list(DTYPES),
            "objects": self._index(names, kinds),
            "optimizer": asdict(self.optimizer),
            "state": asdict(self.state),
            "sha256": _NO_DIGEST,
        }
        data = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        entry = b'"sha256":"%s"'
        # In this order of keys the first such entry is the manifest's own.
        unsigned, signed = entry % _NO_DIGEST.encode(), entry % _digest(data).encode()
        return data.replace(unsigned, signed, 1)

    def _index(self, names: list[str], kinds: list[str]) -> list[dict[str, Any]]:
        """The objects' rows; tensors, kinds and dtypes by number keep large manifests small."""
        tensor_of = {name: number for number, name in enumerate(names)}
        kind_of = {name: number for number, name in enumerate(kinds)}
        dtype_of = {name: number for number, name in enumerate(DTYPES)}
        entries = []
        for stored in self.objects:
            folder, _, name = stored.key.rpartition("/")
            if folder != self.folder:
                raise ValueError(f"object {stored.key} lies outside of {self.folder}")
            rows = [
                [
                    tensor_of[r.tensor],
                    kind_of[r.kind],
                    r.start,
                    r.numel,
                    r.offset,
                    r.length_bytes,
                    dtype_of[r.dtype],
                    r.crc32c,
                ]
                for r in stored.ranges
            ]
            entries.append({"name": name, "size": stored.size, "ranges": rows})
        return entries

    @staticmethod
    def from_json(data: bytes, key: str) -> Manifest:
        """Read a manifest. Nothing of it is trusted: it may come from anywhere.

        Args:
            data: its bytes.
            key: where they lie, ``<stage_index>-<stage>/step-<step>/manifest.json``, for messages;
                it says which folder the objects are in.

        Raises:
            DamagedCheckpoint: not a manifest, of another checkpoint, incomplete, or contradictory.
            CheckpointError: of another version of the format.
        """
        try:
            content = json.loads(data, parse_constant=_refuse_constant)
            found = content["format"], content["version"], content["chunk_bytes"]
            if found[0] == FORMAT and found != (FORMAT, VERSION, CHUNK_BYTES):
                raise CheckpointError(
                    f"{key} is {FORMAT} version {found[1]!s:.20} in chunks of {found[2]!s:.20}; "
                    f"this program reads version {VERSION} in chunks of {CHUNK_BYTES}; use the "
                    "release that wrote it, or start a new run from exported weights"
                )
            digest = content["sha256"]
            if type(digest) is not str or len(digest) != len(_NO_DIGEST):
                raise ValueError("it has no checksum")
            if _digest(data.replace(digest.encode(), _NO_DIGEST.encode())) != digest:
                raise ValueError("its checksum is wrong")
            check_manifest(content, CHUNK_BYTES)
            return _manifest(content, key)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedCheckpoint(f"{key} is damaged ({_cause(error)})") from error


def _manifest(content: Mapping[str, Any], key: str) -> Manifest:
    """A manifest whose values have been checked.

    Raises:
        ValueError: it is of another folder than that of ``key``.
    """
    folder = key.rpartition("/")[0]
    optimizer = content["optimizer"]
    tables = sorted(content["tensors"]), content["kinds"], content["dtypes"]
    manifest = Manifest(
        run_id=content["run_id"],
        run_uid=content["run_uid"],
        attempt=content["attempt"],
        world_size=content["world_size"],
        mesh=content["mesh"],
        parameter_digest=content["parameter_digest"],
        tensors={name: tuple(shape) for name, shape in content["tensors"].items()},
        objects=tuple(_object(entry, folder, *tables) for entry in content["objects"]),
        optimizer=OptimizerState(
            optimizer["name"],
            optimizer["step"],
            tuple(GroupState(**group) for group in optimizer["groups"]),
        ),
        state=TrainState(**content["state"]),
    )
    if manifest.folder != folder:
        raise ValueError(f"it is that of {manifest.folder}")
    if manifest.parameter_digest != parameter_digest(manifest.tensors):
        raise ValueError("parameter_digest is not that of its tensors")
    return manifest


def _object(
    entry: Mapping[str, Any], folder: str, tensors: list[str], kinds: list[str], dtypes: list[str]
) -> StoredObject:
    ranges = tuple(
        StoredRange(
            tensors[tensor], kinds[kind], start, numel, offset, length, dtypes[dtype], tuple(sums)
        )
        for tensor, kind, start, numel, offset, length, dtype, sums in entry["ranges"]
    )
    return StoredObject(f"{folder}/{entry['name']}", entry["size"], ranges)


def _digest(data: bytes) -> str:
    """Of a manifest's bytes, in which zeros stand in the digest's place."""
    return hashlib.sha256(data).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _cause(error: Exception) -> str:
    """What is wrong, in a line of bounded length: the error may quote what it found."""
    text = f"no entry {error}" if isinstance(error, KeyError) else str(error)
    return text if len(text) <= 300 else f"{text[:300]}..."


def object_to_json(stored: StoredObject) -> dict[str, Any]:
    """One object's entry, as a rank sends it to the one that writes the manifest."""
    rows = [
        [r.tensor, r.kind, r.start, r.numel, r.offset, r.length_bytes, r.dtype, list(r.crc32c)]
        for r in stored.ranges
    ]
    return {"key": stored.key, "size": stored.size, "ranges": rows}


def object_from_json(entry: Mapping[str, Any]) -> StoredObject:
    """The inverse of ``object_to_json``."""
    ranges = tuple(
        StoredRange(tensor, kind, start, numel, offset, length, dtype, tuple(checksums))
        for tensor, kind, start, numel, offset, length, dtype, checksums in entry["ranges"]
    )
    return StoredObject(entry["key"], entry["size"], ranges)


def folder_of(stage_index: int, stage: str, step: int) -> str:
    """Key of a checkpoint's folder."""
    return f"{stage_index:02d}-{stage}/step-{step:08d}"


def parse_folder(folder: str) -> tuple[int, str, int] | None:
    """(stage index, stage, step) of a checkpoint's folder; None if it is not one."""
    found = _FOLDER.match(folder)
    return (int(found[1]), found[2], int(found[3])) if found else None


def parameter_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Digest of the names and shapes of all parameters: what makes two states exchangeable."""
    lines = [f"{name}:{','.join(map(str, shapes[name]))}" for name in sorted(shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
