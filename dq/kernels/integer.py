"""What all integer kernels share: integer weights and inputs, in plain torch.

With n the output and k the summed feature, a layer computes

    y[n] = s_x s_n  sum_k (c_k - z) w[n, k]  + b[n],     c_k = clamp(round(x_k * (1 / s_x)) + z)

where c are unsigned input codes and w = (code - offset) * multiplier whole numbers within int8: the
sum is exact whatever the order. Scaling is float32. Inputs meet one over the scale, rounded: to
multiply is several times as fast as to divide, and differs from it only next to a tie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dq.kernels.kernel import Arguments
from dq.packing import packed_length, unpack

__all__ = ["InputPart", "input_parts", "integer_weight"]


class InputPart(NamedTuple):
    """A segment of input channels, quantized.

    Attributes:
        channels: Which channels (dimension 1 of the input).
        codes: uint8, the shape of that slice.
        zero: Code of zero.
        scale: float32, broadcasts against the output.
    """

    channels: slice
    codes: Tensor
    zero: int
    scale: Tensor


def integer_weight(a: Arguments) -> Tensor:
    """Return the whole-number weights `(N, K)` int8 that codes and multipliers stand for."""
    packed = a.weight.flatten(1)
    length = packed_length(a.columns, a.weight_bits)
    codes = unpack(packed[:, :length], a.weight_bits, a.columns)
    if a.weight_bits == 8:
        return (codes ^ 128).view(torch.int8)
    levels = codes.view(torch.int8)
    # A single bit is a sign.
    levels = 2 * levels - 1 if a.weight_bits == 1 else levels - (1 << (a.weight_bits - 1))
    if a.groups == 0:
        return levels
    multiplier = unpack(packed[:, length:], a.multiplier_bits, a.groups).view(torch.int8) + 1
    # -8 * 16 = -128 is the one product that touches the end of int8.
    return (levels.view(len(levels), a.groups, -1) * multiplier.unsqueeze(-1)).flatten(1)


def input_parts(x: Tensor, a: Arguments) -> list[InputPart]:
    """Quantize an input `(R, C)` or `(B, C, H, W)`; dynamic ones by row or image."""
    if a.input_affine is None:
        scale, zero = _dynamic_scale(x, a.input_bits), 1 << (a.input_bits - 1)
        return [InputPart(slice(None), _codes(x, scale, zero, a), zero, scale)]
    parts, start = [], 0
    for size, (scale, zero_code) in zip(a.segments or [x.shape[1]], a.input_affine, strict=True):
        channels, zero = slice(start, start + size), int(zero_code)
        parts.append(InputPart(channels, _codes(x[:, channels], scale, zero, a), zero, scale))
        start += size
    return parts


def _codes(x: Tensor, scale: Tensor, zero: int, a: Arguments) -> Tensor:
    levels = torch.round(x.float() * scale.reciprocal()) + zero
    return levels.clamp(0, (1 << a.input_bits) - 1).to(torch.uint8)


def _dynamic_scale(x: Tensor, bits: int) -> Tensor:
    """Return the scale that maps the largest magnitude of each row or image to the top code."""
    reach = x.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True).float()
    tiny = torch.finfo(torch.float32).tiny
    return (reach / ((1 << (bits - 1)) - 1)).clamp_min_(tiny)
