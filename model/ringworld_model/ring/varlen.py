"""Variable-length calls: the rectangles of one ring step in as few flash calls as they allow.

A variable-length flash call attends many sequences at once, each to its own keys: all of them in
full, or all causal. Here a sequence is a rectangle. Rectangles share a call where they are of one
kind and no query row and no key row is in two of them, so that each row of out, lse, dq, dk and dv
has one writer.

B rows, T local tokens.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ringworld_model.ring.plan import RingPlan
from ringworld_model.ring.rectangle import Rectangle, Rectangles
from ringworld_model.ring.spans import rows_in
from ringworld_model.ring.upload import upload

MANY_CALLS = 8
"""Flash calls of one ring step from which on a warning is given."""


class Sequences(NamedTuple):
    """Where the sequences of one call begin and end, as flash ops want it."""

    cu_queries: torch.Tensor
    """int32 [sequences + 1] on the device: first query row of each, and the total."""
    cu_keys: torch.Tensor
    """int32 [sequences + 1] on the device, likewise."""
    max_queries: int
    max_keys: int
    causal: bool
    """Query i of a sequence sees its keys 0 to i; such a sequence has as many queries as keys."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Local tokens that a call reads and writes: one range, else a list of indices.

    Attributes:
        start: first token.
        stop: past the last token.
        index: int64 [tokens] on the device where they are not all of [start, stop).
    """

    start: int
    stop: int
    index: torch.Tensor | None

    def of(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """These tokens of a tensor whose dim ``dim`` is T: a view where they are one range."""
        if self.index is None:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        return tensor.index_select(dim, self.index)

    def packed(self, tensor: torch.Tensor) -> torch.Tensor:
        """These tokens of [B, T, heads, D], row after row: [B * tokens, heads, D]."""
        packed = self.of(tensor).flatten(0, 1)
        # Flash kernels load 16 bytes at a time: not broadcast tensors, such as the gradient of a
        # mean, and no rows or heads that begin elsewhere.
        offset, *strides = packed.storage_offset(), *packed.stride()[:2]
        loads = all(of * packed.itemsize % 16 == 0 for of in (offset, *strides))
        return (
            packed
            if loads and 0 not in strides
            else packed.clone(memory_format=torch.contiguous_format)
        )

    def add_(self, tensor: torch.Tensor, packed: torch.Tensor) -> None:
        """Add [B * tokens, heads, D] to these tokens of [B, T, heads, D], in place."""
        values = packed.unflatten(0, (len(tensor), -1))
        if self.index is None:
            self.of(tensor).add_(values)
        else:
            # No token is in the list twice, so the order of the sums is no question.
            tensor.index_add_(1, self.index, values.to(tensor.dtype))


class VarlenCall(NamedTuple):
    """One call: which tokens, and how they fall into sequences."""

    queries: Tokens
    keys: Tokens
    sequences: Sequences


def varlen_calls(
    plan: RingPlan, rank: int, step: int, num_rows: int, device: torch.device
) -> list[VarlenCall]:
    """Return the calls of one ring step for neighbouring rows of one plan; cached on the plan.

    Args:
        plan: of the rows.
        rank: this rank's place in the ring.
        step: ring step.
        num_rows: rows of the batch that share the plan; they share the calls too.
        device: where the calls run.
    """
    key = ("varlen", rank, step, num_rows, device)
    if key not in plan.cache:
        groups = group_rectangles(plan.rectangles(rank, step))
        if len(groups) >= MANY_CALLS:
            # Rounded down to a power of two: Python shows each distinct warning once.
            warnings.warn(
                f"the {plan.layout} layout of these documents takes {_rounded(len(groups))} or "
                "more flash calls in a ring step, which is slow; use attention.layout: auto, or "
                "attention.backend: triton",
                RuntimeWarning,
                stacklevel=2,
            )
        plan.cache[key] = [_call(group, num_rows, device) for group in groups]
    calls: list[VarlenCall] = plan.cache[key]
    return calls


def group_rectangles(rectangles: Rectangles) -> list[Rectangles]:
    """Group the rectangles of one ring step into calls, each group ordered by its queries.

    Each goes into the first group that takes it. Documents do not meet, so there are as many groups
    as the most divided document needs.
    """
    if len(rectangles) == 0:
        return []
    before, after = rectangles.sides[:-1], rectangles.sides[1:]
    if bool((before[:, 1::2] <= after[:, ::2]).all()):
        # Mostly so: each document is one rectangle, and none need be looked at by itself.
        return [rectangles]
    groups: list[_Group] = []
    for rectangle in rectangles:
        if not any(group.take(rectangle) for group in groups):
            groups.append(_Group(rectangle))
    return [Rectangles(group.sides(), rectangles.diagonal) for group in groups]


class _Group:
    def __init__(self, rectangle: Rectangle) -> None:
        self._rectangles = [rectangle]
        self._by_key = [(rectangle.k0, rectangle.k1)]

    def take(self, new: Rectangle) -> bool:
        by_key, keys = self._by_key, (new.k0, new.k1)
        key_at = bisect_left(by_key, keys)
        at = bisect_left(self._rectangles, new)
        before, after = self._rectangles[at - 1 : at], self._rectangles[at : at + 1]
        if (
            (before and before[0].q1 > new.q0)
            or (after and after[0].q0 < new.q1)
            or (key_at > 0 and by_key[key_at - 1][1] > new.k0)
            or (key_at < len(by_key) and by_key[key_at][0] < new.k1)
        ):
            return False
        self._rectangles.insert(at, new)
        by_key.insert(key_at, keys)
        return True

    def sides(self) -> torch.Tensor:
        return torch.tensor([each[:4] for each in self._rectangles])


def _rounded(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def _call(group: Rectangles, num_rows: int, device: torch.device) -> VarlenCall:
    queries, keys = group.sides.split(2, dim=1)
    lengths = [bounds.diff(dim=1)[:, 0] for bounds in (queries, keys)]
    longest_queries, longest_keys = (int(of.max()) for of in lengths)
    cu_queries, cu_keys = (_cumulative(of, num_rows, device) for of in lengths)
    return VarlenCall(
        _tokens(queries, device),
        _tokens(keys, device),
        Sequences(cu_queries, cu_keys, longest_queries, longest_keys, group.diagonal),
    )


def _tokens(bounds: torch.Tensor, device: torch.device) -> Tokens:
    """The tokens of ranges [start, stop), int64 [N, 2]."""
    start, stop = int(bounds[0, 0]), int(bounds[-1, 1])
    if torch.equal(bounds[:-1, 1], bounds[1:, 0]):
        return Tokens(start, stop, None)
    return Tokens(start, stop, upload(rows_in(bounds), device))


def _cumulative(lengths: torch.Tensor, num_rows: int, device: torch.device) -> torch.Tensor:
    bounds = torch.nn.functional.pad(lengths.repeat(num_rows).cumsum(0), (1, 0))
    return upload(bounds.to(torch.int32), device)
