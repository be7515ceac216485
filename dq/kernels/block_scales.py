"""NVFP4 and MX blocks as Blackwell's tensor cores take them: codes, bytes of scales, their order.

Functions are pure and run on any device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from dq.blocks import float_blocks, outer_scale
from dq.quantize import dequantize
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["Blocks", "decoded", "in_blocks", "pairs", "swizzled"]


class Blocks(NamedTuple):
    """A matrix in blocks along its rows.

    Attributes:
        codes: `(R, K)` uint8, of the elements.
        scales: `(R, K / n)` uint8, codes of the scale format.
        outer: `(R, 1)` or `(1, 1)` float32 that multiplies them; 1 for MX.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor


def in_blocks(x: Tensor, spec: TensorSpec) -> Blocks:
    """Quantize an input to the bits that `dq.quantize` gives, without a look at its values.

    A card would have to be waited for to find what is not finite.

    Args:
        x: `(R, K)` floating point.
        spec: Dynamic, in blocks of floats or powers of two.
    """
    grid, scale_grid = spec.grid, spec.scale_grid
    assert scale_grid is not None  # blocks have one
    outer = outer_scale(x.abs().amax(1, keepdim=True), spec)
    parts = x.float().unflatten(1, (-1, spec.granularity.size))
    scales = float_blocks(parts, outer, spec)
    codes = grid.encode(parts / (outer * scales).unsqueeze(-1)).flatten(1)
    return Blocks(codes, scale_grid.encode(scales), outer)


def decoded(blocks: Blocks, spec: TensorSpec) -> Tensor:
    """Return the float32 matrix that blocks stand for."""
    assert spec.scale_grid is not None  # blocks have one
    scales = Scales(blocks.outer, None, spec.scale_grid.decode(blocks.scales))
    return dequantize(blocks.codes, scales, spec)


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
