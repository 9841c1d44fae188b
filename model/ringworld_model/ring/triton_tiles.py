"""What the Triton kernels share: where a program works, and how it reads tiles.

Offsets within a tile fit 32 bits; where a tile begins may not (a million tokens times heads times
width), so tiles begin at 64-bit offsets.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

COUNTS = ("visit_count", "length", "all_heads", "heads", "group", "heads_at_once")
"""Arguments that differ from batch to batch and rank to rank: no kernel is compiled anew for them,
which would halt the whole ring."""

VECTORS = ("lse", "delta", "visits", "masked", "ranges")
"""Pointers whose alignment, for the same reason, is not asked for."""


@triton.jit
def place_program(visits: tl.tensor, heads: tl.tensor, heads_at_once: tl.tensor) -> tl.tensor:
    """Return (row of the tile table, head) of this program.

    Heads are taken ``heads_at_once`` together, so that what they share stays in the L2 cache; of
    those, every head's heaviest tile comes first.
    """
    program = tl.program_id(0)
    per_section = visits * heads_at_once
    section = program // per_section
    first = section * heads_at_once
    here = tl.minimum(heads_at_once, heads - first)
    rest = program - section * per_section
    return rest // here, first + rest % here


@triton.jit
def read_tile(
    base: tl.tensor,
    row: tl.tensor,
    stride: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Return rows [row, row + TILE) of a [tokens, D] matrix: [TILE, BLOCK_D].

    Columns from D on are 0; so are, where MASKED, rows outside [low, high). UPCAST is for the
    interpreter, whose products of half types are wrong.
    """
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_D)
    # 32 bits but for the tile's own place, or pointers take most registers.
    within = rows[:, None] * stride + columns[None, :]
    pointers = base + row * tl.cast(stride, tl.int64) + within
    if MASKED:
        inside = (row + rows >= low) & (row + rows < high)
        if D == BLOCK_D:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def write_tile(
    base: tl.tensor,
    tile: tl.tensor,
    row: tl.tensor,
    stride: tl.tensor,
    wanted: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Write or add ``tile`` [TILE, BLOCK_D] to the ``wanted`` [TILE] rows from ``row`` on."""
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_D)
    within = rows[:, None] * stride + columns[None, :]
    pointers = base + row * tl.cast(stride, tl.int64) + within
    mask = wanted[:, None] & (columns < D)[None, :]
    if ADD:
        tile += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def read_row(
    base: tl.tensor,
    row: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    other: tl.tensor,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Return elements [row, row + TILE) of a vector; ``other`` outside [low, high) where MASKED."""
    at = row + tl.arange(0, TILE)
    if MASKED:
        return tl.load(base + at, mask=(at >= low) & (at < high), other=other)
    else:
        return tl.load(base + at)


@triton.jit
def clean(tile: tl.tensor) -> tl.tensor:
    """Return ``tile`` with 0 for what is not finite, and whether each row had any of that.

    Zero times NaN is NaN: rows of one document must not meet another document's in a product.
    """
    finite = tl.abs(tile.to(tl.float32)) < float("inf")
    bad = tl.max(tl.where(finite, 0, 1), 1) > 0
    return tl.where(finite, tile, 0.0).to(tile.dtype), bad
