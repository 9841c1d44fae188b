"""Triton kernels of dQ and of delta, which both backward kernels need.

One ring step of one row group is added to what there is, by tiles of queries; the formulas are in
``triton_backward_keys``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringworld_model.ring.triton_tiles import (
    COUNTS,
    LOG2E,
    VECTORS,
    clean,
    place_program,
    read_row,
    read_tile,
    write_tile,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def sum_delta(
    grad_out: tl.tensor,
    out: tl.tensor,
    delta: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    grad_b: tl.tensor,
    grad_t: tl.tensor,
    grad_h: tl.tensor,
    out_b: tl.tensor,
    out_t: tl.tensor,
    out_h: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Write delta fp32 [B, H, T], the sum over D of grad_out * out, both [B, T, H, D]."""
    tiles = tl.cdiv(length, TILE)
    row = tl.program_id(0) % tiles * TILE
    head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    batch, head_q = head // heads, head % heads
    grad_base = grad_out + batch * grad_b + head_q * grad_h
    out_base = out + batch * out_b + head_q * out_h
    grad = read_tile(grad_base, row, grad_t, 0, length, D, BLOCK_D, TILE, True, UPCAST)
    result = read_tile(out_base, row, out_t, 0, length, D, BLOCK_D, TILE, True, UPCAST)
    total = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    rows = row + tl.arange(0, TILE)
    tl.store(delta + head * length + rows, total, mask=rows < length)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def attend_backward_queries(
    grad_out: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dq: tl.tensor,
    visits: tl.tensor,
    masked: tl.tensor,
    ranges: tl.tensor,
    scale: tl.tensor,
    visit_count: tl.tensor,
    length: tl.tensor,
    all_heads: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    heads_at_once: tl.tensor,
    grad_b: tl.tensor,
    grad_t: tl.tensor,
    grad_h: tl.tensor,
    q_b: tl.tensor,
    q_t: tl.tensor,
    q_h: tl.tensor,
    k_b: tl.tensor,
    k_t: tl.tensor,
    k_h: tl.tensor,
    v_b: tl.tensor,
    v_t: tl.tensor,
    v_h: tl.tensor,
    dq_b: tl.tensor,
    dq_t: tl.tensor,
    dq_h: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Add to dq [B, T, H, D], or write it where FIRST. ``heads`` counts query heads."""
    at, head = place_program(visit_count, all_heads, heads_at_once)
    visit = visits + at * 8
    tile = tl.load(visit)
    full_begin, full_end = tl.load(visit + 1), tl.load(visit + 2)
    low, high = tl.load(visit + 3), tl.load(visit + 4)
    begin, mixed, end = tl.load(visit + 5), tl.load(visit + 6), tl.load(visit + 7)
    row = tl.multiple_of(tile * TILE_Q, TILE_Q)
    batch, head_q = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    q_base = q + batch * q_b + head_q * q_h
    grad_base = grad_out + batch * grad_b + head_q * grad_h
    k_base = k + batch * k_b + (head_q // group) * k_h
    v_base = v + batch * v_b + (head_q // group) * v_h
    sums = tl.cast(head, tl.int64) * length
    q_tile = read_tile(q_base, row, q_t, 0, length, D, BLOCK_D, TILE_Q, True, UPCAST)
    g_tile = read_tile(grad_base, row, grad_t, 0, length, D, BLOCK_D, TILE_Q, True, UPCAST)
    row_lse = read_row(lse + sums, row, 0, length, 0.0, TILE_Q, True) * LOG2E
    row_delta = read_row(delta + sums, row, 0, length, 0.0, TILE_Q, True)
    scale_log2 = scale * LOG2E
    dq_tile = tl.zeros([TILE_Q, BLOCK_D], tl.float32)

    seen_begin = read_row(ranges, row, 0, length, 0, TILE_Q, True)
    seen_end = read_row(ranges + length, row, 0, length, 0, TILE_Q, True)
    for key in tl.range(full_begin * TILE_K, full_end * TILE_K, TILE_K):
        dq_tile = _add_to_queries(
            *(dq_tile, q_tile, g_tile, row_lse, row_delta, k_base, v_base),
            *(key, low, high, seen_begin, seen_end, scale_log2, k_t, v_t),
            *(D, BLOCK_D, TILE_K, False, False, UPCAST, PRECISION),
        )
    for place in tl.range(begin, mixed):
        dq_tile = _add_to_queries(
            *(dq_tile, q_tile, g_tile, row_lse, row_delta, k_base, v_base),
            *(
                tl.load(masked + place) * TILE_K,
                low,
                high,
                seen_begin,
                seen_end,
                scale_log2,
                k_t,
                v_t,
            ),
            *(D, BLOCK_D, TILE_K, True, False, UPCAST, PRECISION),
        )
    for place in tl.range(mixed, end):
        dq_tile = _add_to_queries(
            *(dq_tile, q_tile, g_tile, row_lse, row_delta, k_base, v_base),
            *(
                tl.load(masked + place) * TILE_K,
                low,
                high,
                seen_begin,
                seen_end,
                scale_log2,
                k_t,
                v_t,
            ),
            *(D, BLOCK_D, TILE_K, True, True, UPCAST, PRECISION),
        )

    inside = row + tl.arange(0, TILE_Q) < length
    # Padding in a tile of one document shares that document's NaN, if it has any.
    dq_tile = tl.where((seen_end == seen_begin)[:, None], 0.0, dq_tile * scale)
    dq_base = dq + batch * dq_b + head_q * dq_h
    write_tile(dq_base, dq_tile, row, dq_t, inside, D, BLOCK_D, TILE_Q, not FIRST)


@triton.jit
def _add_to_queries(
    dq_tile: tl.tensor,
    q_tile: tl.tensor,
    g_tile: tl.tensor,
    row_lse: tl.tensor,
    row_delta: tl.tensor,
    k_base: tl.tensor,
    v_base: tl.tensor,
    key: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    seen_begin: tl.tensor,
    seen_end: tl.tensor,
    scale_log2: tl.tensor,
    k_t: tl.tensor,
    v_t: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_K: tl.constexpr,
    MASKED: tl.constexpr,
    MIXED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return dq_tile with the share of one tile of keys."""
    key = tl.multiple_of(key, TILE_K)
    k_tile = read_tile(k_base, key, k_t, low, high, D, BLOCK_D, TILE_K, MASKED, UPCAST)
    v_tile = read_tile(v_base, key, v_t, low, high, D, BLOCK_D, TILE_K, MASKED, UPCAST)
    if MIXED:
        k_tile, bad = clean(k_tile)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
    dweights = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
    dscores = weights * (dweights - row_delta[:, None])
    if MIXED:
        dscores = tl.where(bad[None, :], float("nan"), dscores)
    if MASKED:
        keys = tl.arange(0, TILE_K)[None, :]
        visible = (keys >= (seen_begin - key)[:, None]) & (keys < (seen_end - key)[:, None])
        dscores = tl.where(visible, dscores, 0.0)
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq_tile, input_precision=PRECISION)
