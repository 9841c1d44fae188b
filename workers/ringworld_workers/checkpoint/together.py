"""One rank's failure becomes every rank's: the others would wait for it in the next collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringworld_workers.checkpoint.exchange import all_gather_json, broadcast_json
from ringworld_workers.checkpoint.layout import CheckpointError, DamagedCheckpoint
from ringworld_workers.mesh import Mesh
from ringworld_workers.store.base import StoreError

Failure = CheckpointError | StoreError


def raise_together(failure: Failure | None, mesh: Mesh) -> None:
    """Raise on every rank if one failed. A collective.

    Of several failures one is raised that may pass, else one that is no damage: what is not damaged
    for certain must not be taken for damaged.

    Raises:
        CheckpointError, DamagedCheckpoint, StoreError: as the rank's own; names the rank.
    """
    told = all_gather_json(_told(failure), mesh)
    failed = [(rank, found) for rank, found in enumerate(told) if found is not None]
    if not failed:
        return
    rank, found = min(failed, key=lambda entry: _ORDER.index(entry[1]["kind"]))
    raise _rebuilt(found, f"rank {rank}: " if mesh.world_size > 1 else "") from failure


def from_rank_0(action: Callable[[], Any], mesh: Mesh) -> Any:
    """What ``action`` returns on rank 0, the only one that runs it, on every rank. A collective.

    Args:
        action: returns what JSON can hold.
        mesh: whose ranks take part.

    Raises:
        CheckpointError, DamagedCheckpoint, StoreError: as ``action`` raised it on rank 0.
    """
    value, failure = None, None
    if mesh.rank == 0:
        try:
            value = action()
        except (CheckpointError, StoreError) as error:
            failure = error
    answer = broadcast_json({"value": value, "failure": _told(failure)}, mesh)
    if answer["failure"] is not None:
        raise failure if failure is not None else _rebuilt(answer["failure"], "")
    return answer["value"]


_ORDER = ("store", "checkpoint", "damaged")


def _told(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    if isinstance(failure, StoreError):
        fields = (failure.operation, failure.key, failure.reason)
        return {
            "kind": "store",
            "fields": fields,
            "transient": failure.transient,
            "attempts": failure.attempts,
        }
    kind = "damaged" if isinstance(failure, DamagedCheckpoint) else "checkpoint"
    return {"kind": kind, "text": str(failure)}


def _rebuilt(told: dict[str, Any], prefix: str) -> Failure:
    if told["kind"] == "store":
        operation, key, reason = told["fields"]
        return StoreError(
            prefix + operation, key, reason, transient=told["transient"], attempts=told["attempts"]
        )
    kind = DamagedCheckpoint if told["kind"] == "damaged" else CheckpointError
    return kind(prefix + told["text"])
