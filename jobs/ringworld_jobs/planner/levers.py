"""What makes a stage fit that does not: the cheapest changes of the spec, tried out one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ringworld_jobs.memory import MOST_TILES
from ringworld_jobs.planner.estimate import PlanError, StageEstimate, estimate_stage
from ringworld_jobs.planner.hardware import GIB, Hardware
from ringworld_jobs.spec import JobSpec, StageSpec
from ringworld_jobs.units import format_tokens
from ringworld_model.config import ModelConfig

LOSS_TILE, MLP_TILE = 512, 4096
MOST_GROWTH = 64
"""More devices are tried up to so many times those that there are."""


@dataclass(frozen=True, slots=True)
class Change:
    """One field of the job, and its new value.

    Attributes:
        path: in the stage, or in the job where ``whole`` is set.
        value: the new one.
        whole: it is the job's field, not the stage's.
        count: devices that it needs; 0 for those that there are.
    """

    path: tuple[str, ...]
    value: Any
    whole: bool = False
    count: int = 0


@dataclass(frozen=True, slots=True)
class Remedy:
    """Changes that make a stage fit.

    Attributes:
        changes: all are needed; the cheapest first.
        yaml: as the spec has to say it, by line.
        count: devices that it takes.
        after: the stage with them, estimated anew.
    """

    changes: tuple[Change, ...]
    yaml: tuple[str, ...]
    count: int
    after: StageEstimate


def find_remedy(spec: JobSpec, index: int, hardware: Hardware, model: ModelConfig) -> Remedy | None:
    """The cheapest changes with which a stage fits.

    Levers are added in the order of their cost until the stage fits; then each that is not needed
    after all is taken out again, the dearest first. So no lever is used where cheaper ones do.

    Args:
        spec: the job.
        index: a stage that does not fit.
        hardware: what there is.
        model: the model's shape.

    Returns:
        None where even the largest number of devices that is tried does not do.
    """
    now = estimate_stage(spec, index, hardware, model)
    ladder = list(_host_levers(spec, now) if now.fits_device else _device_levers(now))
    ladder += _larger_rings(now, hardware)
    ladder += _more_devices(now, hardware)

    def after_all(changes: Sequence[Change]) -> StageEstimate | None:
        return _try(spec, index, hardware, model, changes)

    pulled = _pull(ladder, after_all, now.fits_host)
    if pulled is None:
        return None
    pulled = _without_needless(pulled, lambda changes: bool((e := after_all(changes)) and e.fits))
    after = after_all(pulled)
    assert after is not None
    count = max((change.count for change in pulled), default=0) or hardware.count
    return Remedy(tuple(pulled), _as_yaml(spec.stages[index].name, pulled), count, after)


def _pull(
    ladder: Sequence[Change],
    after_all: Callable[[Sequence[Change]], StageEstimate | None],
    fits_host: bool,
) -> list[Change] | None:
    """Levers one after another until the stage fits; None where it never does.

    One that moves to the host what the host cannot hold is left out.
    """
    pulled: list[Change] = []
    for change in ladder:
        more = _with(pulled, change)
        after = after_all(more)
        if after is None or (fits_host and not after.fits_host):
            continue
        pulled, fits_host = more, after.fits_host
        if after.fits:
            return pulled
    return None


def _with(pulled: Sequence[Change], change: Change) -> list[Change]:
    """One more, in the place of an earlier change of the same field."""
    if all(other.path != change.path for other in pulled):
        return [*pulled, change]
    return [change if other.path == change.path else other for other in pulled]


def _without_needless(
    pulled: list[Change], fits: Callable[[Sequence[Change]], bool]
) -> list[Change]:
    """Take out what is not needed, the dearest first, until nothing more can go."""
    for change in reversed(pulled):
        fewer = [other for other in pulled if other is not change]
        if fewer and fits(fewer):
            return _without_needless(fewer, fits)
    return pulled


def _device_levers(now: StageEstimate) -> Iterator[Change]:
    """What a stage can do on the devices that it has, the cheapest first."""
    stage, memory = now.work.stage, now.work.stage.memory
    for rows in _halves(stage.micro_batch_size):
        yield Change(("micro_batch_size",), rows)
    if stage.loss.tile_tokens > LOSS_TILE:
        yield Change(("loss", "tile_tokens"), LOSS_TILE)
    tile = max(MLP_TILE, 1 << (-(-now.work.local_tokens // MOST_TILES) - 1).bit_length())
    if memory.mlp_tile_tokens is None or memory.mlp_tile_tokens > tile:
        yield Change(("memory", "mlp_tile_tokens"), tile)
    modes = ["none", "attention_saved", "full"]
    for mode in modes[modes.index(memory.activation_checkpointing) + 1 :]:
        yield Change(("memory", "activation_checkpointing"), mode)
    if not memory.activation_offload:
        yield Change(("memory", "activation_offload"), True)
    for zero_stage in range(stage.zero_stage + 1, 4):
        yield Change(("zero_stage",), zero_stage)
    if not memory.optimizer_offload:
        yield Change(("memory", "optimizer_offload"), True)
    if not memory.parameter_offload:
        yield Change(("memory", "parameter_offload"), True)


def _host_levers(spec: JobSpec, now: StageEstimate) -> Iterator[Change]:
    """What takes less of the host."""
    if now.work.stage.memory.activation_checkpointing == "attention_saved":
        yield Change(("memory", "activation_checkpointing"), "full")
    if spec.checkpoint.max_host_bytes is None and now.memory.host["snapshot"] > 4 * GIB:
        yield Change(("checkpoint", "max_host_bytes"), "4Gi", whole=True)


def _larger_rings(now: StageEstimate, hardware: Hardware) -> Iterator[Change]:
    """More places for one row, within the workers that there are."""
    asked = now.work.stage.mesh.sequence_parallel
    heads = now.mesh.heads_size
    ring = now.mesh.ring_size * 2
    most = hardware.count
    while ring * heads <= most:
        value: Any = ring if isinstance(asked, int | str) else {"ring": ring, "heads": heads}
        yield Change(("mesh",), {"sequence_parallel": value, "data_parallel": "auto"})
        ring *= 2


def _more_devices(now: StageEstimate, hardware: Hardware) -> Iterator[Change]:
    """More workers: for one ring as long as that helps, for ZeRO to shard over in any case."""
    count = hardware.count * 2
    while count <= hardware.count * MOST_GROWTH:
        yield Change(("resources", "workers", "max"), count, whole=True, count=count)
        yield from _device_levers(now)  # of which some were too much for fewer hosts
        yield from _larger_rings(now, hardware.grown(count))
        count *= 2


def _halves(rows: int) -> list[int]:
    """Smaller micro-batches that divide the rows: 8 gives 4, 2, 1."""
    found = []
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        found.append(rows)
    return found if rows == 1 else [*found, 1]


def _try(
    spec: JobSpec, index: int, hardware: Hardware, model: ModelConfig, changes: Sequence[Change]
) -> StageEstimate | None:
    """The stage with these changes; None where they cannot be made together."""
    count = max((change.count for change in changes), default=0) or hardware.count
    try:
        changed = _changed(spec, index, changes)
        if not _possible(changed.stages[index]):
            return None
        return estimate_stage(changed, index, hardware.grown(count), model)
    except PlanError:
        return None


def _possible(stage: StageSpec) -> bool:
    """Whether each lever has what it needs, see ``memory.check_memory``."""
    memory = stage.memory
    return not (
        (memory.activation_offload and memory.activation_checkpointing == "none")
        or (memory.optimizer_offload and stage.zero_stage == 0)
        or (memory.parameter_offload and stage.zero_stage != 3)
    )


def _changed(spec: JobSpec, index: int, changes: Sequence[Change]) -> JobSpec:
    data = spec.model_dump(mode="json", exclude_none=True)
    for change in changes:
        place = data if change.whole else data["stages"][index]
        for name in change.path[:-1]:
            place = place.setdefault(name, {})
        place[change.path[-1]] = change.value
    return JobSpec.model_validate(data)


def _as_yaml(name: str, changes: Sequence[Change]) -> tuple[str, ...]:
    """``- {name: 1m, zero_stage: 3}`` under the stage, and lines of the job's own fields."""
    stage: dict[str, Any] = {}
    job: dict[str, Any] = {}
    for change in changes:
        place = job if change.whole else stage
        for part in change.path[:-1]:
            place = place.setdefault(part, {})
        place[change.path[-1]] = change.value
    lines = [f"stages: [{_flow({'name': name} | stage)}]"] if stage else []
    return tuple(lines + [f"{key}: {_flow(value)}" for key, value in job.items()])


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.strip().removesuffix("\n...")


def shortage(estimate: StageEstimate) -> str:
    """What does not fit, in a sentence; empty where all does."""
    if not estimate.fits_device:
        have, need = estimate.device.memory_bytes, estimate.memory.device_bytes
        part, largest = max(estimate.memory.device.items(), key=lambda item: item[1])
        return (
            f"a worker needs {need / GIB:.1f} GiB of {have / GIB:.1f} on its {estimate.device.name}"
            f" ({part} {largest / GIB:.1f}) at {format_tokens(estimate.work.local_tokens)} tokens"
        )
    if not estimate.fits_host:
        need, have = estimate.on_host_bytes, estimate.device.host_bytes
        part, largest = max(estimate.memory.host.items(), key=lambda item: item[1])
        return (
            f"a worker needs {need / GIB:.1f} GiB of host memory, and its share of a node is "
            f"{have / GIB:.1f} ({part} {largest / GIB:.1f})"
        )
    return ""
