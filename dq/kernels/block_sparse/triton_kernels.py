"""Triton kernels of block-sparse attention with operands of 8 bits.

Two of them. The first reads the tokens of a block where the table says they are, rounds them and
writes them at their places: order and rounding are one pass. The second goes through the live
blocks of a row of blocks by their numbers, so that what is not live is never looked at, and writes
each output where its token is.

They compute what `dq.kernels.block_sparse.by_block` defines, but for sums in another order.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend", "round_rows"]


@triton.jit
def _as_e4m3(x, INTERPRETED: tl.constexpr):
    """Return float8 e4m3 of numbers up to 448; to the nearest, where the interpreter cuts off."""
    if INTERPRETED:
        wide = x * 1048577.0  # 2**20 + 1: what is left has four digits
        nearest = wide - (wide - x)
        fine = (x + 24576.0) - 24576.0  # 1.5 * 2**23 * 2**-9, the step of the smallest
        x = tl.where(tl.abs(x) < 0.015625, fine, nearest)
    return x.to(tl.float8e4nv)


@triton.jit
def round_rows(
    x, mean, table, out, scales,
    stride_b, stride_h, stride_n, heads, places, depth, out_n, out_d,
    SIZE: tl.constexpr, DEPTH: tl.constexpr, LARGEST: tl.constexpr, FLOATS: tl.constexpr,
    BY_FEATURE: tl.constexpr, CENTRED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Round one block of tokens, of one head of one image.

    x: `(B, H, N, D)`, features side by side. mean: `(B, H, D)` float32, taken off if CENTRED.
    table: `(H, L)` int32. out: `(B, H, L, D)` int8 or float8, of strides out_n and out_d. scales: `(B, H, blocks)` float32, or
    `(B, H, blocks, D)` BY_FEATURE.
    """
    block, which = tl.program_id(0), tl.program_id(1)
    image, head = which // heads, which % heads
    rows = block * SIZE + tl.arange(0, SIZE)
    features = tl.arange(0, DEPTH)
    token = tl.load(table + head * places + rows)
    there = (token >= 0)[:, None] & (features < depth)[None, :]
    at = image * stride_b + head * stride_h + token[:, None] * stride_n + features[None, :]
    value = tl.load(x + at, there, 0.0).to(tl.float32)
    if CENTRED:
        middle = tl.load(mean + which * depth + features, features < depth, 0.0)
        value = tl.where(there, value - middle[None, :], 0.0)
    blocks = places // SIZE
    if BY_FEATURE:
        scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LARGEST
        tl.store(scales + (which * blocks + block) * depth + features, scale, features < depth)
        level = value / scale[None, :]
    else:
        scale = tl.maximum(tl.max(tl.abs(value)), 1e-12) / LARGEST
        tl.store(scales + which * blocks + block, scale)
        level = value / scale
    if FLOATS:
        level = _as_e4m3(level, INTERPRETED)
    else:
        # Half to even, as the formats round: plus and minus 1.5 * 2**23 leaves whole numbers.
        level = ((level + 12582912.0) - 12582912.0).to(tl.int8)
    place = out + which * places * depth + rows[:, None] * out_n + features[None, :] * out_d
    real = (features[None, :] < depth) & (rows[:, None] >= 0)
    tl.store(place, level, real)


@triton.jit
def attend(
    q, k, v, q_scales, k_scales, v_scales, table, counts, numbers, out,
    v_b, v_h, v_n, v_d, out_b, out_h, out_n, heads, places, depth, key_blocks, factor,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, VALUES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute one block of queries, of one head of one image.

    q, k: `(B, H, L, D)` int8 with a scale a block. v: as they are in the model (VALUES 0), int8
    (1) or float8 e4m3 (2), `(B, H, L, D)` with a scale a block and feature. factor: scale of the
    scores, in powers of two. out: `(B, H, N, D)` by strides.
    """
    block, which = tl.program_id(0), tl.program_id(1)
    image, head = which // heads, which % heads
    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns, features = tl.arange(0, KEYS), tl.arange(0, DEPTH)
    inside = features < depth
    at = (which * places + rows)[:, None] * depth + features[None, :]
    query = tl.load(q + at, inside[None, :], 0)
    blocks = places // QUERIES
    step = tl.load(q_scales + which * blocks + block) * factor
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, DEPTH), tl.float32)
    home = head * blocks + block
    for index in range(0, tl.load(counts + home)):
        number = tl.load(numbers + home * key_blocks + index)
        places_k = number * KEYS + columns
        token = tl.load(table + head * places + places_k)
        stored = which * places + places_k
        key = tl.load(k + stored[None, :] * depth + features[:, None], inside[:, None], 0)
        scores = tl.dot(query, key).to(tl.float32)
        scores *= step * tl.load(k_scales + which * key_blocks + number)
        scores = tl.where((token >= 0)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fresh, before = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        total = total * before + tl.sum(fresh, 1)
        if VALUES == 0:
            place = image * v_b + head * v_h + token[:, None] * v_n + features[None, :]
            value = tl.load(v + place, (token >= 0)[:, None] & inside[None, :], 0.0)
            found = tl.dot(fresh.to(value.dtype), value).to(tl.float32)
        else:
            within = places_k[:, None] * v_n + features[None, :] * v_d
            where = v + which * places * depth + within
            by_feature = tl.load(
                v_scales + (which * key_blocks + number) * depth + features, inside, 0.0
            )
            if VALUES == 1:
                value = tl.load(where, inside[None, :], 0)
                share = tl.maximum(tl.max(fresh), 1e-12) / 127.0
                level = (fresh / share + 12582912.0) - 12582912.0
                found = tl.dot(level.to(tl.int8), value).to(tl.float32) * share
            else:
                value = tl.load(where, inside[None, :], 0.0)
                level = _as_e4m3(fresh * 448.0, INTERPRETED)
                found = tl.dot(level, value).to(tl.float32) * (1.0 / 448.0)
            found *= by_feature[None, :]
        # A sum of its own for each block: 8-bit accumulators of some cards keep fewer digits.
        sums = sums * before[:, None] + found
        top = higher
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    token = tl.load(table + head * places + rows)
    place = image * out_b + head * out_h + token[:, None] * out_n + features[None, :]
    tl.store(place + out, result.to(out.dtype.element_ty), (token >= 0)[:, None] & inside[None, :])
