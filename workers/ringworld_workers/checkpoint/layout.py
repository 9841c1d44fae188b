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
from typing import Any

FORMAT = "ringworld-checkpoint"
VERSION = 2
CHUNK_BYTES = 4 * 1024 * 1024
"""Each range has a checksum for every so many bytes, so that a part of it can be read verified."""
MANIFEST = "manifest.json"
SET_ASIDE = "manifest.damaged.json"
"""What the manifest of a checkpoint is called once it was found damaged."""
_FOLDER = re.compile(r"^(\d{2,})-(.+)/step-(\d{8,})$")


class CheckpointError(RuntimeError):
    """A checkpoint is absent, damaged, or of another model; the message names the object."""


class DamagedCheckpoint(CheckpointError):
    """A committed checkpoint that can never be loaded again, though an older one may.

    A flipped byte, a truncated or missing object, a manifest that cannot be read or is of another
    run; not a store that cannot be reached. The message names object and byte range.
    """


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


@dataclass(frozen=True)
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

    def to_json(self) -> bytes:
        """Canonical bytes: equal manifests are equal bytes."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "chunk_bytes": CHUNK_BYTES,
            "run_id": self.run_id,
            "run_uid": self.run_uid,
            "attempt": self.attempt,
            "stage": self.state.stage,
            "step": self.state.step,
            "world_size": self.world_size,
            "mesh": self.mesh,
            "spec_digest": self.state.spec_digest,
            "parameter_digest": self.parameter_digest,
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "objects": [object_to_json(stored) for stored in self.objects],
            "optimizer": asdict(self.optimizer),
            "state": asdict(self.state),
        }
        return _canonical({**content, "sha256": _digest(content)})

    @staticmethod
    def from_json(data: bytes, key: str) -> Manifest:
        """Read a manifest.

        Args:
            data: its bytes.
            key: where they come from, for messages.

        Raises:
            CheckpointError: not a manifest, of another version, or incomplete.
        """
        try:
            content = json.loads(data)
            found = content["format"], content["version"], content["chunk_bytes"]
            if found != (FORMAT, VERSION, CHUNK_BYTES):
                raise CheckpointError(
                    f"{key} is {found[0]} version {found[1]} in chunks of {found[2]}; this program "
                    f"reads {FORMAT} version {VERSION} in chunks of {CHUNK_BYTES}"
                )
            if content.pop("sha256") != _digest(content):
                raise ValueError("its checksum is wrong")
            optimizer = content["optimizer"]
            return Manifest(
                run_id=content["run_id"],
                attempt=content["attempt"],
                world_size=content["world_size"],
                mesh=content["mesh"],
                parameter_digest=content["parameter_digest"],
                tensors={name: tuple(shape) for name, shape in content["tensors"].items()},
                objects=tuple(object_from_json(stored) for stored in content["objects"]),
                optimizer=OptimizerState(
                    optimizer["name"],
                    optimizer["step"],
                    tuple(GroupState(**group) for group in optimizer["groups"]),
                ),
                state=TrainState(**content["state"]),
                run_uid=content.get("run_uid", ""),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{key} is damaged ({type(error).__name__}: {error}); resume from an "
                "older checkpoint"
            ) from error


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(content: Mapping[str, Any]) -> str:
    """Of a manifest's values, whatever their spacing and order."""
    return hashlib.sha256(_canonical(content)).hexdigest()


def object_to_json(stored: StoredObject) -> dict[str, Any]:
    """One object's entry; ranges are rows, to keep manifests of large models small."""
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
