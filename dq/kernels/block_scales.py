"""NVFP4 and MX blocks as Blackwell's tensor cores take them: codes, bytes of scales, their order.

What a block's scale is, and when a value is rounded to what, is said by `dq.blocks` and
`dq.quantize`; here it is said once more for inputs, in plain torch and to the same bits, because
kernels lie below both. Functions are pure and run on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.kernels.floats import Fields, decode, encode, fields

__all__ = ["MX", "NVFP4", "Blocks", "decoded", "mx_blocks", "nvfp4_blocks", "pairs", "swizzled"]

NVFP4, MX = 16, 32  # elements of a block

_TINY = torch.finfo(torch.float32).tiny
_LEAST = 2.0**-9  # e4m3 level: a block of scale 0 could not be divided
_ROOM = 256.0  # beside 448, for rules that may choose a larger scale than the nearest
_CODES = range(-8, 6)  # e4m3 scales that "search" tries, in codes from the nearest
_TOP_CODE = 126  # of e4m3: 448
_BELOW = (0, 1, 2)  # powers of two that "search" tries, counted down
_BIAS = 127  # of E8M0


class Blocks(NamedTuple):
    """A matrix in blocks along its rows.

    Attributes:
        codes: `(R, K)` uint8, of the elements.
        scales: `(R, K / n)` uint8, bit patterns of e4m3 (NVFP4) or E8M0 (MX).
        outer: `(R, 1)` float32 that multiplies those of NVFP4; None for MX.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor | None


def nvfp4_blocks(x: Tensor, rule: str) -> Blocks:
    """Quantize an input to e2m1 with an e4m3 scale a block of 16 and a float32 one a row.

    Args:
        x: `(R, K)` floating point.
        rule: "nearest", "four-six" or "search"; see `dq.blocks`.
    """
    grid = fields("e2m1")
    top = fields("e4m3").high if rule == "nearest" else _ROOM
    outer = x.abs().amax(1, keepdim=True).float() / (grid.high * top)
    outer = torch.where(outer > _TINY, outer, 1.0)
    parts = x.float().unflatten(1, (-1, NVFP4))
    nearest = parts.abs().amax(-1) / grid.high / outer
    scales = _least(_nvfp4_scales(nearest, rule), parts, outer, "e2m1")
    codes = encode(parts / (outer * scales).unsqueeze(-1), "e2m1").flatten(1)
    return Blocks(codes, encode(scales, "e4m3"), outer)


def _nvfp4_scales(nearest: Tensor, rule: str) -> list[Tensor]:
    """Return the scales that a rule tries, e4m3 levels as float32."""
    if rule == "search":
        code = encode(nearest, "e4m3").int()
        tried = ((code + offset).clamp(1, _TOP_CODE).to(torch.uint8) for offset in _CODES)
        return [decode(each, "e4m3") for each in tried]
    factors = (1.0, 1.5) if rule == "four-six" else (1.0,)
    rounded = (decode(encode(nearest * factor, "e4m3"), "e4m3") for factor in factors)
    return [each.clamp_min(_LEAST) for each in rounded]


def mx_blocks(x: Tensor, name: str, rule: str) -> Blocks:
    """Quantize an input with a power of two a block of 32.

    Args:
        x: `(R, K)` floating point.
        name: Of the elements' format.
        rule: "floor", "ceil", "even", "rceil" or "search"; see `dq.blocks`.
    """
    parts = x.float().unflatten(1, (-1, MX))
    exponents = _mx_exponents(parts.abs().amax(-1), fields(name), rule)
    powers = [_power(each) for each in exponents]
    scales = _least(powers, parts, torch.ones(1, 1, device=x.device), name)
    codes = encode(parts / scales.unsqueeze(-1), name).flatten(1)
    return Blocks(codes, (torch.frexp(scales).exponent - 1 + _BIAS).to(torch.uint8), None)


def _mx_exponents(reach: Tensor, grid: Fields, rule: str) -> list[Tensor]:
    """Return the exponents that a rule tries for blocks of some largest magnitudes."""
    if rule in ("rceil", "search"):
        whole = _above(reach / grid.high)
        return [whole - below for below in (_BELOW if rule == "search" else (0,))]
    if rule == "ceil":
        return [_above(reach) - grid.emax]
    if rule == "even":  # to the mantissa of an element first
        fraction, exponent = torch.frexp(reach)
        steps = float(1 << (grid.mantissa + 1))
        reach = torch.ldexp(torch.floor(fraction * steps + 0.5) / steps, exponent)
    return [_below(reach) - grid.emax]


def _below(x: Tensor) -> Tensor:
    """Return the exponent of the power of two at or below each; far below all of them for 0."""
    return torch.where(x > 0, torch.frexp(x).exponent - 1, -2 * _BIAS)


def _above(x: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(x)
    return torch.where(x > 0, exponent - (fraction == 0.5).int(), -2 * _BIAS)


def _power(exponent: Tensor) -> Tensor:
    exponent = exponent.clamp(-_BIAS, _BIAS)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _least(tried: Sequence[Tensor], parts: Tensor, outer: Tensor, name: str) -> Tensor:
    """Return for each block the scale of least squared error; the first of equals."""
    if len(tried) == 1:
        return tried[0]
    best, least = torch.ones_like(tried[0]), torch.full_like(tried[0], torch.inf)
    for scales in tried:
        step = (outer * scales).unsqueeze(-1)
        error = (decode(encode(parts / step, name), name) * step - parts).square().sum(-1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def decoded(blocks: Blocks, name: str) -> Tensor:
    """Return the float32 matrix that blocks stand for; the block's size tells NVFP4 from MX."""
    levels = decode(blocks.codes, name).unflatten(1, (blocks.scales.shape[1], -1))
    if levels.shape[-1] == NVFP4:
        scales = decode(blocks.scales, "e4m3")
    else:
        scales = _power(blocks.scales.int() - _BIAS)
    if blocks.outer is not None:
        scales = scales * blocks.outer
    return (levels * scales.unsqueeze(-1)).flatten(1)


def pairs(codes: Tensor) -> Tensor:
    """Return 4-bit codes two a byte, the even one low: `(R, K)` to `(R, K / 2)` uint8, dense."""
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def swizzled(scales: Tensor) -> Tensor:
    """Return scales in the order that cuBLAS reads them in, SWIZZLE_32_4_4 to torch.

    They are padded with zeros to tiles of 128 rows by 4 blocks, and tiles follow each other row by
    row. In a tile the scale of row r and block b is number `16 * (r % 32) + 4 * (r // 32) + b`:
    https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout

    Args:
        scales: `(R, G)` uint8.

    Returns:
        `(128 * ceil(R / 128) * 4 * ceil(G / 4),)` uint8.
    """
    rows, groups = scales.shape
    padded = F.pad(scales, (0, -groups % 4, 0, -rows % 128))
    tiles = padded.view(-(-rows // 128), 4, 32, -(-groups // 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten()
