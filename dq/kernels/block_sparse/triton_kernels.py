"""Triton kernels of block-sparse attention, with operands of 16 or 8 bits.

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
    table: `(H, L)` int32. out: `(B, H, L, D)` int8 or float8, its strides out_n and out_d. scales:
    `(B, H, blocks)` float32, or `(B, H, blocks, D)` BY_FEATURE.
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
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, v_d, out_b, out_h, out_n,
    heads, places, depth, key_blocks, factor,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr,
    SCORES: tl.constexpr, VALUES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute one block of queries, of one head of one image.

    q, k: as they are in the model, `(B, H, N, D)` by strides (SCORES 0), or int8 with a scale a
    block, `(B, H, L, D)` (1). v: as they are (VALUES 0), int8 (1) or float8 e4m3 (2) with a scale a
    block and feature. factor: scale of the scores, in powers of two. out: `(B, H, N, D)`.
    """
    block, which = tl.program_id(0), tl.program_id(1)
    image, head = which // heads, which % heads
    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns, features = tl.arange(0, KEYS), tl.arange(0, DEPTH)
    inside = features < depth
    tokens = tl.load(table + head * places + rows)
    real = (tokens >= 0)[:, None] & inside[None, :]
    # What was rounded lies at its place in the order, what was not where its token is. The former
    # holds zeros where no token is: a mask that changes along it would triple the time.
    home = rows if SCORES else tokens
    query = tl.load(
        q + image * q_b + head * q_h + home[:, None] * q_n + features[None, :], real, 0.0
    )
    if SCORES:
        factor *= tl.load(q_scales + which * (places // QUERIES) + block)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, DEPTH), tl.float32)
    line = head * (places // QUERIES) + block
    for index in range(0, tl.load(counts + line)):
        number = tl.load(numbers + line * key_blocks + index)
        place = number * KEYS + columns
        token = tl.load(table + head * places + place)
        there = token >= 0
        at = place if SCORES else token
        key = tl.load(
            k + image * k_b + head * k_h + at[None, :] * k_n + features[:, None],
            inside[:, None] if SCORES else there[None, :] & inside[:, None], 0.0,
        )  # fmt: skip
        scores = tl.dot(query, key).to(tl.float32)
        if SCORES:
            scores *= factor * tl.load(k_scales + which * key_blocks + number)
        else:
            scores *= factor
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fresh, before = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        total = total * before + tl.sum(fresh, 1)
        at = place if VALUES else token
        value = tl.load(
            v + image * v_b + head * v_h + at[:, None] * v_n + features[None, :] * v_d,
            inside[None, :] if VALUES else there[:, None] & inside[None, :], 0.0,
        )  # fmt: skip
        if VALUES == 0:
            found = tl.dot(fresh.to(value.dtype), value).to(tl.float32)
        elif VALUES == 1:
            share = tl.maximum(tl.max(fresh), 1e-12) / 127.0
            level = (fresh / share + 12582912.0) - 12582912.0
            found = tl.dot(level.to(tl.int8), value).to(tl.float32) * share
        else:
            level = _as_e4m3(fresh * 448.0, INTERPRETED)
            found = tl.dot(level, value).to(tl.float32) * (1.0 / 448.0)
        if VALUES:
            by_feature = v_scales + (which * key_blocks + number) * depth + features
            found *= tl.load(by_feature, inside, 0.0)[None, :]
        # A sum of its own for each block: 8-bit accumulators of some cards keep fewer digits.
        sums = sums * before[:, None] + found
        top = higher
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    target = image * out_b + head * out_h + tokens[:, None] * out_n + features[None, :]
    tl.store(target + out, result.to(out.dtype.element_ty), real)
