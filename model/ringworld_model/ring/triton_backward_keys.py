"""Triton kernel of dK and dV: one ring step of one row group, added to what there is.

The weights are made again from the whole row's lse. A program takes one tile of keys, and each
element is written by one program, so that the same inputs give the same bits.

With P the weights and dO the gradient of out: dV = P^T dO, dP = dO V^T, dS = P * (dP - delta) with
delta = rowsum(dO * out), dQ = scale dS K, dK = scale dS^T Q (arXiv 2205.14135, appendix B.4).
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
def attend_backward_keys(
    grad_out: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
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
    dk_b: tl.tensor,
    dk_t: tl.tensor,
    dk_h: tl.tensor,
    dv_b: tl.tensor,
    dv_t: tl.tensor,
    dv_h: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Add to dk and dv, fp32 [B, T, Hkv, D].

    A program takes one tile of keys of one key head, and all query heads of that one. All products
    are transposed, keys first, so that weights are never moved. ``heads`` counts key heads.
    """
    at, head = place_program(visit_count, all_heads, heads_at_once)
    visit = visits + at * 8
    tile = tl.load(visit)
    full_begin, full_end = tl.load(visit + 1), tl.load(visit + 2)
    low, high = tl.load(visit + 3), tl.load(visit + 4)
    begin, mixed, end = tl.load(visit + 5), tl.load(visit + 6), tl.load(visit + 7)
    row = tl.multiple_of(tile * TILE_K, TILE_K)
    batch, head_k = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    k_base = k + batch * k_b + head_k * k_h
    v_base = v + batch * v_b + head_k * v_h
    k_tile = read_tile(k_base, row, k_t, 0, length, D, BLOCK_D, TILE_K, True, UPCAST)
    v_tile = read_tile(v_base, row, v_t, 0, length, D, BLOCK_D, TILE_K, True, UPCAST)
    scale_log2 = scale * LOG2E
    dk_tile = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([TILE_K, BLOCK_D], tl.float32)
    seen_begin = read_row(ranges, row, 0, length, 0, TILE_K, True)
    seen_end = read_row(ranges + length, row, 0, length, 0, TILE_K, True)

    # One loop over the tiles of all query heads: loads of the next head begin in time.
    q_base = q + batch * q_b + head_k * group * q_h
    grad_base = grad_out + batch * grad_b + head_k * group * grad_h
    lse_base = lse + (batch * heads + head_k) * group * length
    delta_base = delta + (batch * heads + head_k) * group * length
    full, single, several = full_end - full_begin, mixed - begin, end - mixed
    for turn in tl.range(0, group * full):
        member = turn // full
        query = (full_begin + turn - member * full) * TILE_Q
        dk_tile, dv_tile = _add_to_keys(
            *(dk_tile, dv_tile, k_tile, v_tile, q_base, grad_base, lse_base, delta_base),
            *(tl.cast(member, tl.int64), query, low, high, seen_begin, seen_end, scale_log2),
            *(length, q_t, q_h, grad_t, grad_h),
            *(D, BLOCK_D, TILE_Q, False, False, UPCAST, PRECISION),
        )
    for turn in tl.range(0, group * single):
        member = turn // single
        query = tl.load(masked + begin + turn - member * single) * TILE_Q
        dk_tile, dv_tile = _add_to_keys(
            *(dk_tile, dv_tile, k_tile, v_tile, q_base, grad_base, lse_base, delta_base),
            *(tl.cast(member, tl.int64), query, low, high, seen_begin, seen_end, scale_log2),
            *(length, q_t, q_h, grad_t, grad_h),
            *(D, BLOCK_D, TILE_Q, True, False, UPCAST, PRECISION),
        )
    for turn in tl.range(0, group * several):
        member = turn // several
        query = tl.load(masked + mixed + turn - member * several) * TILE_Q
        dk_tile, dv_tile = _add_to_keys(
            *(dk_tile, dv_tile, k_tile, v_tile, q_base, grad_base, lse_base, delta_base),
            *(tl.cast(member, tl.int64), query, low, high, seen_begin, seen_end, scale_log2),
            *(length, q_t, q_h, grad_t, grad_h),
            *(D, BLOCK_D, TILE_Q, True, True, UPCAST, PRECISION),
        )

    # Padding in a tile of one document shares that document's NaN, if it has any: not written.
    real = seen_end > seen_begin
    dk_base = dk + batch * dk_b + head_k * dk_h
    dv_base = dv + batch * dv_b + head_k * dv_h
    write_tile(dv_base, dv_tile, row, dv_t, real, D, BLOCK_D, TILE_K, True)
    write_tile(dk_base, dk_tile * scale, row, dk_t, real, D, BLOCK_D, TILE_K, True)


@triton.jit
def _add_to_keys(
    dk_tile: tl.tensor,
    dv_tile: tl.tensor,
    k_tile: tl.tensor,
    v_tile: tl.tensor,
    q_base: tl.tensor,
    grad_base: tl.tensor,
    lse_base: tl.tensor,
    delta_base: tl.tensor,
    member: tl.tensor,
    query: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    seen_begin: tl.tensor,
    seen_end: tl.tensor,
    scale_log2: tl.tensor,
    length: tl.tensor,
    q_t: tl.tensor,
    q_h: tl.tensor,
    grad_t: tl.tensor,
    grad_h: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    MASKED: tl.constexpr,
    MIXED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return dk_tile and dv_tile with the share of one tile of queries of one member's head."""
    query = tl.multiple_of(query, TILE_Q)
    q_tile = read_tile(
        q_base + member * q_h, query, q_t, low, high, D, BLOCK_D, TILE_Q, MASKED, UPCAST
    )
    g_tile = read_tile(
        grad_base + member * grad_h, query, grad_t, low, high, D, BLOCK_D, TILE_Q, MASKED, UPCAST
    )
    row_lse = read_row(lse_base + member * length, query, low, high, 0.0, TILE_Q, MASKED)
    row_delta = read_row(delta_base + member * length, query, low, high, 0.0, TILE_Q, MASKED)
    if MIXED:
        q_tile, q_bad = clean(q_tile)
        g_tile, g_bad = clean(g_tile)
        row_lse = tl.where(q_bad | g_bad, float("nan"), row_lse)
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - (row_lse * LOG2E)[None, :])
    if MASKED:
        queries = tl.arange(0, TILE_Q)[None, :]
        visible = (queries >= (seen_begin - query)[:, None]) & (
            queries < (seen_end - query)[:, None]
        )
        weights = tl.where(visible, weights, 0.0)
    dv_tile = tl.dot(weights.to(g_tile.dtype), g_tile, dv_tile, input_precision=PRECISION)
    dweights = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
    dscores = weights * (dweights - row_delta[None, :])
    if MASKED:
        dscores = tl.where(visible, dscores, 0.0)
    dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)
    return dk_tile, dv_tile
