"""Packing of short codes into bytes: any width from 1 to 8, any length, also on the meta device.

A width is written as a sum of 4-, 2- and 1-bit *fields* (3 = 2 + 1, 6 = 4 + 2); an 8-bit code is
its own byte. Each field of all codes of a row forms one plane, planes follow each other. Inside a
plane the row is cut into `8 // width` parts that lie in the same bytes, the first part in the
lowest bits: unpacking is then one mask or shift a part, and never interleaves.

    4 bits, 6 codes a b c d e f:   byte 0 = a | d << 4,  byte 1 = b | e << 4,  byte 2 = c | f << 4
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.errors import DQError

__all__ = ["pack", "packed_length", "unpack"]


def _fields(bits: int) -> tuple[int, ...]:
    """Return the widths whose sum is `bits`, largest first."""
    if not 1 <= bits <= 8:
        raise DQError(f"a code has 1 to 8 bits, not {bits}")
    return (8,) if bits == 8 else tuple(width for width in (4, 2, 1) if bits & width)


def packed_length(length: int, bits: int) -> int:
    """Return the number of bytes that a row of `length` codes of `bits` bits takes."""
    return sum(-(-length * width // 8) for width in _fields(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension.

    Args:
        codes: `(..., K)` uint8, each below `2**bits`.
        bits: Width of a code, 1 to 8.

    Returns:
        `(..., packed_length(K, bits))` uint8; for 8 bits this is `codes` itself.
    """
    planes, shift = [], 0
    for width in _fields(bits):
        if width == 8:
            return codes
        field = (codes >> shift) & ((1 << width) - 1)
        parts = 8 // width
        count = -(-codes.shape[-1] // parts)
        field = torch.nn.functional.pad(field, (0, count * parts - codes.shape[-1]))
        plane = field[..., :count].clone()
        for part in range(1, parts):
            plane |= field[..., part * count : (part + 1) * count] << (part * width)
        planes.append(plane)
        shift += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Invert `pack`.

    Args:
        packed: `(..., packed_length(length, bits))` uint8.
        bits: Width of a code, 1 to 8.
        length: Number of codes in a row, K.

    Returns:
        `(..., K)` uint8 codes; for 8 bits this is `packed` itself.

    Raises:
        DQError: If the last dimension of `packed` is not what `length` and `bits` need.
    """
    if packed.shape[-1] != packed_length(length, bits):
        raise DQError(
            f"{packed.shape[-1]} bytes cannot hold {length} codes of {bits} bits; "
            f"expected {packed_length(length, bits)} bytes"
        )
    codes: Tensor | None = None
    start = shift = 0
    for width in _fields(bits):
        if width == 8:
            return packed
        parts = 8 // width
        count = -(-length // parts)
        plane = packed[..., start : start + count]
        mask = (1 << width) - 1
        field = torch.cat([(plane >> (part * width)) & mask for part in range(parts)], dim=-1)
        field = field[..., :length] << shift
        codes = field if codes is None else codes | field
        start += count
        shift += width
    assert codes is not None  # every width has a field
    return codes
