"""What differs between two checkpoints, whatever the meshes that wrote them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch

from ringworld_workers.checkpoint.layout import CheckpointRef, Manifest
from ringworld_workers.checkpoint.range_reader import RangeReader
from ringworld_workers.checkpoint_tools.choose import manifest_of
from ringworld_workers.checkpoint_tools.parallel import in_parallel
from ringworld_workers.engine.base import OwnedRange, RangeKind
from ringworld_workers.store.base import Store

_READERS = 3
_PIECE_NUMEL = 4 * 1024 * 1024
_STEP_NUMEL = 512 * 1024
ELEMENT_BYTES = 4

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """Something of the state or the optimizer that is not the same."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor of which some element is not bit for bit the same."""

    tensor: str
    kind: str
    numel: int
    num_different: int
    """Elements whose bits differ."""
    max_abs: float
    """The largest difference; NaN where an element of one is no number."""
    relative: float
    """``max_abs`` over the largest magnitude in either."""


@dataclass(frozen=True, slots=True)
class Difference:
    """All that two checkpoints differ in. Their runs, attempts and meshes do not count."""

    values: tuple[ValueDifference, ...]
    shapes: tuple[ValueDifference, ...]
    """Tensors that only one has (the other's shape is None), or that have two shapes."""
    tensors: tuple[TensorDifference, ...]
    num_equal: int
    """Tensors that are bit-equal, an optimizer's moments counted too."""

    @property
    def equal(self) -> bool:
        """Whether a run goes on from both in the same way."""
        return not (self.values or self.shapes or self.tensors)


def bytes_to_read(first: Manifest, second: Manifest) -> int:
    """Bytes that ``diff`` reads of both together."""
    shapes = [shape for _, _, shape in _common(first, second)]
    return 2 * sum(map(prod, shapes)) * ELEMENT_BYTES


def diff(
    stores: tuple[Store, Store],
    refs: tuple[CheckpointRef, CheckpointRef],
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Difference:
    """Compare two checkpoints, element by element.

    Every byte is verified. A few pieces of 16 MiB are in memory at a time.

    Args:
        stores: that hold them.
        refs: which two.
        on_bytes: told how many more bytes were read.

    Raises:
        CheckpointError: one is damaged, or was removed.
        StoreError: a store failed.
    """
    first, second = (manifest_of(s, ref) for s, ref in zip(stores, refs, strict=True))
    readers = RangeReader(stores[0], first), RangeReader(stores[1], second)
    common = _common(first, second)
    totals = {(tensor, kind): _Total() for tensor, kind, _ in common}

    def compare(piece: tuple[str, str, Shape, int, int]) -> tuple[tuple[str, str], _Total]:
        tensor, kind, shape, start, stop = piece
        halves = []
        for reader in readers:
            data = torch.empty(stop - start, dtype=torch.float32)
            reader.read_into(OwnedRange(tensor, cast(RangeKind, kind), shape, start, data))
            halves.append(data)
        return (tensor, kind), _compared(*halves)

    for (tensor, kind), part in in_parallel(compare, _pieces(common), _READERS):
        totals[tensor, kind].add(part)
        on_bytes(2 * part.numel * ELEMENT_BYTES)
    changed = tuple(
        TensorDifference(
            tensor, kind, total.numel, total.num_different, total.max_abs, total.relative
        )
        for (tensor, kind), total in totals.items()
        if total.num_different
    )
    shapes = tuple(_different_shapes(first, second))
    return Difference(tuple(_values(first, second)), shapes, changed, len(common) - len(changed))


@dataclass(slots=True)
class _Total:
    """What is known of a tensor from the pieces compared so far."""

    numel: int = 0
    num_different: int = 0
    max_abs: float = 0.0
    largest: float = 0.0

    def add(self, part: _Total) -> None:
        self.numel += part.numel
        self.num_different += part.num_different
        self.max_abs = _larger(self.max_abs, part.max_abs)
        self.largest = _larger(self.largest, part.largest)

    @property
    def relative(self) -> float:
        return self.max_abs / self.largest if self.largest else self.max_abs


def _compared(first: torch.Tensor, second: torch.Tensor) -> _Total:
    total = _Total(first.numel())
    for one, other in zip(first.split(_STEP_NUMEL), second.split(_STEP_NUMEL), strict=True):
        largest = max(one.abs().max(), other.abs().max())
        total.largest = _larger(total.largest, float(largest))
        changed = one.view(torch.int32) != other.view(torch.int32)
        number = int(changed.sum())
        if number:
            # In fp64: the difference of two large fp32 values is none of fp32.
            apart = (one[changed].double() - other[changed].double()).abs().max()
            total.max_abs = _larger(total.max_abs, float(apart))
            total.num_different += number
    return total


def _larger(a: float, b: float) -> float:
    """The larger one; NaN wins."""
    return a if math.isnan(a) or a >= b else b


def _common(first: Manifest, second: Manifest) -> list[tuple[str, str, Shape]]:
    """(tensor, kind, shape) of all that can be compared, in the order of the first."""
    both = [kind for kind in _kinds(first) if kind in _kinds(second)]
    return [
        (tensor, kind, shape)
        for tensor, shape in first.tensors.items()
        for kind in both
        if second.tensors.get(tensor) == shape and 0 not in shape
    ]


def _kinds(manifest: Manifest) -> dict[str, None]:
    return dict.fromkeys(part.kind for stored in manifest.objects for part in stored.ranges)


def _pieces(common: list[tuple[str, str, Shape]]) -> Iterator[tuple[str, str, Shape, int, int]]:
    for tensor, kind, shape in common:
        numel = prod(shape)
        for start in range(0, numel, _PIECE_NUMEL):
            yield tensor, kind, shape, start, min(start + _PIECE_NUMEL, numel)


def _different_shapes(first: Manifest, second: Manifest) -> Iterator[ValueDifference]:
    for name in first.tensors | second.tensors:
        shapes = first.tensors.get(name), second.tensors.get(name)
        if shapes[0] != shapes[1]:
            yield ValueDifference(name, *shapes)


def _values(first: Manifest, second: Manifest) -> Iterator[ValueDifference]:
    """Of the state and the optimizer, by name."""
    values = _flat(first), _flat(second)
    for name in values[0] | values[1]:
        pair = values[0].get(name), values[1].get(name)
        if pair[0] != pair[1]:
            yield ValueDifference(name, *pair)


def _flat(manifest: Manifest) -> dict[str, Any]:
    state, optimizer = manifest.state, manifest.optimizer
    found: dict[str, Any] = {
        "stage": state.stage,
        "stage_index": state.stage_index,
        "step": state.step,
        "tokens": state.tokens,
        "cursor": state.cursor,
        "learning_rate": state.learning_rate,
        "final": state.final,
        "rng": state.rng,
        "bookmark": state.bookmark,
    }
    found |= {f"metrics.{name}": value for name, value in state.metrics.items()}
    found |= {"optimizer": optimizer.name, "optimizer.step": optimizer.step}
    for group in optimizer.groups:
        found[f"optimizer.{group.name}.learning_rate"] = group.learning_rate
        found[f"optimizer.{group.name}.weight_decay"] = group.weight_decay
    return found | {f"optimizer.{kind}": True for kind in _kinds(manifest)}
