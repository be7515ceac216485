"""Inputs of integer layers to codes, as fast as the machine can.

`dq.kernels.integer.input_parts` says what is computed. Here it happens in one native pass where
there is a compiler and the layout allows it, and otherwise, also in graphs that torch.compile
makes, in the torch operations of that definition, which a compiler fuses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dq.kernels.integer import input_parts
from dq.kernels.kernel import Affine, Arguments
from dq.kernels.native import calls, library

__all__ = ["Codes", "affine_of", "quantized"]


class Codes(NamedTuple):
    """A quantized input.

    Attributes:
        parts: uint8, one a segment of channels; those of images are laid out channels last.
        scales: Of dynamic inputs, float32, one a row or image; None for static ones.
    """

    parts: list[Tensor]
    scales: Tensor | None


def affine_of(a: Arguments) -> list[Affine]:
    """Read the scales of static inputs; empty for dynamic ones."""
    if a.input_affine is None:
        return []
    inverses = a.input_affine[:, 0].reciprocal().tolist()
    pairs = a.input_affine.tolist()
    return [Affine(s, inverse, int(z)) for (s, z), inverse in zip(pairs, inverses, strict=True)]


def quantized(x: Tensor, a: Arguments, affine: list[Affine]) -> Codes:
    """Quantize an input `(R, C)` or `(B, C, H, W)`.

    Args:
        x: Floating point.
        a: Of the layer.
        affine: What `affine_of` returned; not read in graphs, whose constants it would become.
    """
    if torch.compiler.is_compiling() or x.dtype not in calls.DTYPES or library() is None:
        return _plain(x, a)
    if a.input_affine is None:
        return _rows_alone(x, a)
    top, parts, start = (1 << a.input_bits) - 1, [], 0
    for size, each in zip(a.segments or [x.shape[1]], affine, strict=True):
        part = x if size == x.shape[1] else x[:, start : start + size]
        parts.append(_static(part, each, top))
        start += size
    return Codes(parts, None)


def _plain(x: Tensor, a: Arguments) -> Codes:
    parts = input_parts(x, a)
    codes = [part.codes for part in parts]
    if x.dim() == 4:
        codes = [each.contiguous(memory_format=torch.channels_last) for each in codes]
    return Codes(codes, parts[0].scale if a.input_affine is None else None)


def _static(x: Tensor, affine: Affine, top: int) -> Tensor:
    if x.dim() == 2:
        rows = x if x.stride(1) == 1 else x.contiguous()
        return calls.quantize_rows(rows, affine.inverse, affine.zero, top)
    batch, channels, height, width = x.shape
    if x.stride(1) == 1 and x.stride(2) == width * x.stride(3) and _follow(x):
        rows = x.permute(0, 2, 3, 1).view(batch * height * width, channels)
        codes = calls.quantize_rows(rows, affine.inverse, affine.zero, top)
        return codes.view(batch, height, width, channels).permute(0, 3, 1, 2)
    if x.stride(3) != 1 or x.stride(2) != width or x.stride(1) != height * width:
        x = x.contiguous()
    return calls.quantize_planes(x, affine.inverse, affine.zero, top)


def _follow(x: Tensor) -> bool:
    """Whether the images of a batch follow each other, pixel by pixel."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2)


def _rows_alone(x: Tensor, a: Arguments) -> Codes:
    """Quantize with a scale for each row, or for each image."""
    top = (1 << a.input_bits) - 1
    if x.dim() == 2:
        codes, scales = calls.quantize_tokens(x if x.stride(1) == 1 else x.contiguous(), top)
        return Codes([codes], scales)
    # An image is one long row, whatever the order of its numbers: channels last stays so.
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    codes, scales = calls.quantize_tokens(x.permute(0, 2, 3, 1).view(batch, -1), top)
    codes = codes.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return Codes([codes], scales.view(-1, 1, 1, 1))
