"""How many workers a stage runs on, and how they are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ringworld_jobs.spec import ResourcesSpec, SequenceParallelSpec, StageSpec
from ringworld_jobs.units import format_tokens

LOCAL_TOKENS = 32 * 1024
"""Tokens of one row that `sequence_parallel: auto` leaves to each worker, at most."""


class MeshError(ValueError):
    """A stage's mesh and batch do not fit each other or the workers.

    Attributes:
        field: the stage's field to change first, such as ``mesh.data_parallel``.
    """

    def __init__(self, field: str, message: str) -> None:
        """Keep the field beside the message."""
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class MeshSize:
    """The size of each mesh axis.

    Attributes:
        ring_size: places of a ring.
        heads_size: workers of one place, which split the attention heads; 1 in a plain ring.
        data_parallel_size: rings.
    """

    ring_size: int
    data_parallel_size: int
    heads_size: int = 1

    @property
    def sequence_parallel_size(self) -> int:
        """Workers that share one sequence."""
        return self.ring_size * self.heads_size

    @property
    def world_size(self) -> int:
        """Workers in all."""
        return self.sequence_parallel_size * self.data_parallel_size

    def __str__(self) -> str:
        """Write the axes as a sentence needs them."""
        heads = f" x heads {self.heads_size}" if self.heads_size > 1 else ""
        return f"ring {self.ring_size}{heads} x data_parallel {self.data_parallel_size}"


def resolve_mesh(stage: StageSpec, resources: ResourcesSpec) -> MeshSize:
    """Choose the size of each mesh axis.

    ``sequence_parallel: auto`` is the smallest ring that leaves each worker at most 32Ki tokens of
    a row (or all the workers there are, where that is not enough); it never splits heads.
    ``data_parallel: auto`` is the most rings that resources.workers.max holds and that share the
    rows of a step evenly. Where that comes to fewer workers than resources.workers.min, an
    automatic ring grows until it fits.

    Args:
        stage: the stage; its axes are numbers or auto.
        resources: the workers that it may use.

    Raises:
        MeshError: no mesh divides the batch and fits the workers; names the field and the remedy.
    """
    fewest, most = resources.workers.min or 1, resources.workers.max
    data_parallel = stage.mesh.data_parallel
    for ring_size, heads_size in _ring_sizes(stage, most):
        if data_parallel == "auto":
            num_rings = _most_rings(stage, most // (ring_size * heads_size))
        else:
            num_rings = data_parallel
        _check_rows(stage, num_rings)
        mesh = MeshSize(ring_size, num_rings, heads_size)
        if fewest <= mesh.world_size <= most:
            return mesh
    raise _misfit(mesh, stage, resources)


def shrink_mesh(
    stage: StageSpec,
    resources: ResourcesSpec,
    available: int,
    *,
    may_split: Callable[[int], bool] = lambda heads_size: True,
) -> MeshSize | None:
    """The mesh of a stage on fewer workers than it wants.

    data_parallel gives way first, in whole rings that share the rows of a step evenly, then the
    ring, and only where a single ring place does not fit any more, the split of the heads. More
    micro-batches for each ring make up for it: a step keeps its rows and their order.

    Args:
        stage: the stage; what it says of its mesh is a wish here.
        resources: the workers that it may use; ``workers.min`` is how far it may shrink, one whole
            ring where it is empty.
        available: workers that there are.
        may_split: whether that many workers can share the model's heads.

    Returns:
        The wanted mesh where it fits; None where less than that would be left.
        More workers never give a smaller mesh.

    Raises:
        MeshError: not even the wanted mesh is possible; see ``resolve_mesh``.
    """
    wanted = resolve_mesh(stage, resources)
    fewest = resources.workers.min
    if fewest is None:
        fewest = wanted.sequence_parallel_size
    for heads_size in range(wanted.heads_size, 0, -1):
        splits = heads_size == wanted.heads_size or may_split(heads_size)
        if wanted.heads_size % heads_size or not splits:
            continue
        longest = min(wanted.sequence_parallel_size, available) // heads_size
        for ring_size in range(longest, 0, -1):
            limit = min(wanted.data_parallel_size, available // (ring_size * heads_size))
            mesh = MeshSize(ring_size, _most_rings(stage, limit), heads_size)
            if mesh.world_size >= fewest:
                return mesh
    return None


def allowed_meshes(
    stage: StageSpec,
    resources: ResourcesSpec,
    *,
    may_split: Callable[[int], bool] = lambda heads_size: True,
) -> list[MeshSize]:
    """Every mesh that a stage may run on as workers come and go, the wanted one first.

    Raises:
        MeshError: there is none; see ``resolve_mesh``.
    """
    meshes = [resolve_mesh(stage, resources)]
    while True:
        available = meshes[-1].world_size - 1
        smaller = shrink_mesh(stage, resources, available, may_split=may_split)
        if smaller is None:
            return meshes
        meshes.append(smaller)


def _ring_sizes(stage: StageSpec, most: int) -> Iterable[tuple[int, int]]:
    """Ring and heads sizes to try, in order."""
    asked = stage.mesh.sequence_parallel
    if isinstance(asked, SequenceParallelSpec):
        return [(asked.ring, asked.heads)]
    if asked != "auto":
        return [(asked, 1)]
    rings = stage.mesh.data_parallel
    limit = max(1, most if rings == "auto" else most // rings)
    wanted = -(-stage.context_length // LOCAL_TOKENS)
    return ((ring_size, 1) for ring_size in range(min(wanted, limit), limit + 1))


def _most_rings(stage: StageSpec, limit: int) -> int:
    """The most rings up to ``limit`` that share the rows evenly; 1 where none fits."""
    micro_batches = max(1, stage.rows_per_step // stage.micro_batch_size)
    rings = min(limit, micro_batches)
    while rings > 1 and micro_batches % rings:
        rings -= 1
    return max(1, rings)


def _check_rows(stage: StageSpec, num_rings: int) -> None:
    rows = stage.rows_per_step
    at_once = num_rings * stage.micro_batch_size
    if rows % at_once == 0:
        return
    below = rows // at_once * at_once * stage.context_length
    above = (rows // at_once + 1) * at_once * stage.context_length
    options = [format_tokens(tokens) for tokens in (below, above) if tokens]
    field = "mesh.data_parallel" if num_rings > 1 else "micro_batch_size"
    raise MeshError(
        field,
        f"a step has {rows} rows (global_batch_tokens {format_tokens(stage.global_batch_tokens)} / "
        f"context_length {format_tokens(stage.context_length)}), not a multiple of the {at_once} "
        f"computed at once (data_parallel {num_rings} x micro_batch_size "
        f"{stage.micro_batch_size}); set global_batch_tokens to {' or '.join(options)}",
    )


def _misfit(mesh: MeshSize, stage: StageSpec, resources: ResourcesSpec) -> MeshError:
    fewest, most = resources.workers.min or 1, resources.workers.max
    world_size = mesh.world_size
    given = stage.mesh.sequence_parallel != "auto"
    field = "mesh.sequence_parallel" if given else "mesh.data_parallel"
    sequence = (
        f"ring {mesh.ring_size} x heads {mesh.heads_size}"
        if mesh.heads_size > 1
        else f"sequence_parallel {mesh.ring_size}"
    )
    product = (
        f"{sequence} x data_parallel {mesh.data_parallel_size} = "
        f"{world_size} worker{'s' if world_size > 1 else ''}"
    )
    if world_size > most:
        smaller = " or ".join(
            f"mesh.{axis}"
            for axis, size in (
                ("sequence_parallel", mesh.sequence_parallel_size),
                ("data_parallel", mesh.data_parallel_size),
            )
            if size > 1
        )
        return MeshError(
            field,
            f"{product}, and resources.workers.max is {most}; raise it to {world_size} or lower "
            f"{smaller}",
        )
    return MeshError(
        field,
        f"{product}, and resources.workers.min is {fewest}; lower it to {world_size} or enlarge "
        f"the mesh",
    )
