"""Checkpoints as JSON for other programs: what the commands print with --json."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringworld_workers.checkpoint.layout import Manifest
    from ringworld_workers.checkpoint.retention import Removable
    from ringworld_workers.checkpoint_tools.diff import Difference
    from ringworld_workers.checkpoint_tools.listing import CheckpointEntry, Listing
    from ringworld_workers.checkpoint_tools.verify import VerifyReport


def listing_json(url: str, listing: Listing) -> dict[str, Any]:
    """What ``checkpoints list`` prints."""
    return {
        "url": url,
        "checkpoints": [_entry_json(entry) for entry in listing.entries],
        "leftovers": [removable_json(left) for left in listing.leftovers],
    }


def _entry_json(entry: CheckpointEntry) -> dict[str, Any]:
    about: dict[str, Any] = {
        "key": entry.ref.key,
        "stage": entry.ref.stage,
        "stage_index": entry.ref.stage_index,
        "step": entry.ref.step,
        "committed": entry.committed or None,
        "bytes": entry.size,
    }
    if entry.manifest is None:
        return {**about, "problem": entry.problem}
    state = entry.manifest.state
    return {
        **about,
        "tokens": state.tokens,
        "world_size": entry.manifest.world_size,
        "mesh": entry.manifest.mesh,
        "metrics": state.metrics,
        "final": state.final,
        "run_id": entry.manifest.run_id,
        "attempt": entry.manifest.attempt,
    }


def removable_json(removable: Removable) -> dict[str, Any]:
    """Something that may go, or has gone."""
    return {
        "kind": removable.kind,
        "key": removable.key,
        "objects": len(removable.keys),
        "bytes": None if removable.kind == "unfinished" else removable.num_bytes,
        "modified": removable.modified or None,
    }


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """What ``checkpoints show`` prints: all but the ranges and the state of random generators."""
    return {
        "run_id": manifest.run_id,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "mesh": manifest.mesh,
        "state": {**asdict(manifest.state), "rng": None, "bookmark": None},
        "optimizer": asdict(manifest.optimizer),
        "tensors": {name: list(shape) for name, shape in manifest.tensors.items()},
        "objects": [
            {"key": stored.key, "bytes": stored.size, "ranges": len(stored.ranges)}
            for stored in manifest.objects
        ],
    }


def report_json(report: VerifyReport) -> dict[str, Any]:
    """What ``checkpoints verify`` prints of one checkpoint."""
    return {
        "key": report.ref.key,
        "sound": report.sound,
        "problems": list(report.problems),
        "objects": [
            {
                "key": held.key,
                "bytes": held.size,
                "ranges": held.num_ranges,
                "problems": list(held.problems),
            }
            for held in report.objects
        ],
        "unreferenced": [info.key for info in report.unreferenced],
        "bytes_read": report.bytes_read,
    }


def difference_json(names: tuple[str, str], found: Difference) -> dict[str, Any]:
    """What ``checkpoints diff`` prints. A number that is none (NaN) is null."""
    return {
        "urls": list(names),
        "equal": found.equal,
        "values": {change.name: [change.first, change.second] for change in found.values},
        "shapes": {change.name: [change.first, change.second] for change in found.shapes},
        "tensors": [
            {
                "tensor": change.tensor,
                "kind": change.kind,
                "elements": change.numel,
                "different": change.num_different,
                "max_abs": _finite(change.max_abs),
                "relative": _finite(change.relative),
            }
            for change in found.tensors
        ],
        "bit_equal_tensors": found.num_equal,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
