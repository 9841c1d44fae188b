"""Triton kernel of the forward pass: one ring step of one row group, merged into what there is.

A program takes one tile of queries of one head: first the key tiles that need no mask, then those
at a document's ends. Scores are in units of log2, so that exp2 serves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ringworld_model.ring.triton_tiles import (
    COUNTS,
    LN2,
    VECTORS,
    clean,
    place_program,
    read_row,
    read_tile,
    write_tile,
)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def attend_forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
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
    q_b: tl.tensor,
    q_t: tl.tensor,
    q_h: tl.tensor,
    k_b: tl.tensor,
    k_t: tl.tensor,
    k_h: tl.tensor,
    v_b: tl.tensor,
    v_t: tl.tensor,
    v_h: tl.tensor,
    out_b: tl.tensor,
    out_t: tl.tensor,
    out_h: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    FIRST: tl.constexpr,
    NEGATE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Attend; merge into out [B, T, H, D] and lse [B, H, T], or write them where FIRST.

    ``scale`` is in units of log2 and at least 0; scores change sign where NEGATE. The last dims of
    q, k, v and out are contiguous, lse is so as a whole.
    """
    at, head = place_program(visit_count, all_heads, heads_at_once)
    visit = visits + at * 8
    tile = tl.load(visit)
    full_begin, full_end = tl.load(visit + 1), tl.load(visit + 2)
    low, high = tl.load(visit + 3), tl.load(visit + 4)
    begin, mixed, end = tl.load(visit + 5), tl.load(visit + 6), tl.load(visit + 7)
    row = tl.multiple_of(tile * TILE_Q, TILE_Q)
    batch, head_q = tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)
    q_base = q + batch * q_b + head_q * q_h
    k_base = k + batch * k_b + (head_q // group) * k_h
    v_base = v + batch * v_b + (head_q // group) * v_h

    q_tile = read_tile(q_base, row, q_t, 0, length, D, BLOCK_D, TILE_Q, True, UPCAST)
    highest = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    result = tl.zeros([TILE_Q, BLOCK_D], tl.float32)

    for key in tl.range(full_begin * TILE_K, full_end * TILE_K, TILE_K):
        key = tl.multiple_of(key, TILE_K)
        k_tile = read_tile(k_base, key, k_t, 0, 0, D, BLOCK_D, TILE_K, False, UPCAST)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if NEGATE:
            scores = -scores
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        v_tile = read_tile(v_base, key, v_t, 0, 0, D, BLOCK_D, TILE_K, False, UPCAST)
        result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
        highest = higher

    seen_begin = read_row(ranges, row, 0, length, 0, TILE_Q, True)
    seen_end = read_row(ranges + length, row, 0, length, 0, TILE_Q, True)
    for place in tl.range(begin, mixed):
        highest, total, result = _fold_masked(
            *(highest, total, result, q_tile, k_base, v_base, tl.load(masked + place) * TILE_K),
            *(low, high, seen_begin, seen_end, scale, k_t, v_t),
            *(D, BLOCK_D, TILE_K, False, NEGATE, UPCAST, PRECISION),
        )
    for place in tl.range(mixed, end):
        highest, total, result = _fold_masked(
            *(highest, total, result, q_tile, k_base, v_base, tl.load(masked + place) * TILE_K),
            *(low, high, seen_begin, seen_end, scale, k_t, v_t),
            *(D, BLOCK_D, TILE_K, True, NEGATE, UPCAST, PRECISION),
        )

    # A row that saw nothing has a total of 0, whatever its tile's keys left in its result.
    unseen = total == 0.0
    total = tl.where(unseen, 1.0, total)
    result = tl.where(unseen[:, None], 0.0, result / total[:, None])
    block_lse = tl.where(unseen, float("-inf"), (highest + tl.log2(total)) * LN2)
    inside = row + tl.arange(0, TILE_Q) < length
    out_base = out + batch * out_b + head_q * out_h
    lse_at = lse + tl.cast(head, tl.int64) * length + row + tl.arange(0, TILE_Q)
    if FIRST:
        tl.store(lse_at, block_lse, mask=inside)
    else:
        # As merge.merge_ does it; here a row that saw nothing keeps what it has.
        old_lse = tl.load(lse_at, mask=inside, other=0.0)
        old = read_tile(out_base, row, out_t, 0, length, D, BLOCK_D, TILE_Q, True, False)
        weight = tl.where(unseen, 0.0, 1.0 / (1.0 + tl.exp(old_lse - block_lse)))
        result = old + weight[:, None] * (result - old)
        top = tl.maximum(old_lse, block_lse)
        merged = top + tl.log(tl.exp(old_lse - top) + tl.exp(block_lse - top))
        tl.store(lse_at, tl.where(unseen, old_lse, merged), mask=inside)
    write_tile(out_base, result, row, out_t, inside, D, BLOCK_D, TILE_Q, False)


@triton.jit
def _fold_masked(
    highest: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    q_tile: tl.tensor,
    k_base: tl.tensor,
    v_base: tl.tensor,
    key: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    seen_begin: tl.tensor,
    seen_end: tl.tensor,
    scale: tl.tensor,
    k_t: tl.tensor,
    v_t: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_K: tl.constexpr,
    MIXED: tl.constexpr,
    NEGATE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Fold one tile of keys of which some are hidden into the running softmax."""
    key = tl.multiple_of(key, TILE_K)
    k_tile = read_tile(k_base, key, k_t, low, high, D, BLOCK_D, TILE_K, True, UPCAST)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    if NEGATE:
        scores = -scores
    v_tile = read_tile(v_base, key, v_t, low, high, D, BLOCK_D, TILE_K, True, UPCAST)
    if MIXED:
        v_tile, bad = clean(v_tile)
        scores = tl.where(bad[None, :], float("nan"), scores)
    keys = tl.arange(0, TILE_K)[None, :]
    visible = (keys >= (seen_begin - key)[:, None]) & (keys < (seen_end - key)[:, None])
    scores = tl.where(visible, scores * scale, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    # Rows that have seen nothing yet: (-inf) - (-inf) is NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    result = result * shrink[:, None]
    result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, 1), result
