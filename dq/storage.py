"""From a float weight to the tensors that are stored, and back: pure, on any device, meta too.

Local names, without the prefix of the layer:

| name           | shape and dtype        | holds                                             |
|----------------|------------------------|---------------------------------------------------|
| `weight`       | (N, bytes) uint8       | by row, each packed: K codes, then G multipliers  |
|                |                        | minus one (two-level scales), then G codes of     |
|                |                        | zero (asymmetric formats)                         |
| `weight_scale` | (N,) or (N, G) float32 | one a row, or one a group                         |

Short codes share one tensor because every tensor costs about 130 bytes of file header.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dq.formats import formats
from dq.packing import pack, packed_length, unpack
from dq.quantize import dequantize, quantize
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["pack_weight", "stored_shapes", "unpack_weight"]


def _row(spec: TensorSpec, columns: int, groups: int) -> list[tuple[int, int]]:
    """Return (number of codes, bits) of codes, multipliers and zeros; absent ones have number 0."""
    two_level = spec.scale_format != "float32"
    bits = spec.grid.bits
    return [
        (columns, bits),
        (groups if two_level else 0, formats[spec.scale_format].bits if two_level else 1),
        (0 if spec.symmetric else groups, bits),
    ]


def stored_shapes(
    spec: TensorSpec, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each stored tensor of an `(N, K)` weight."""
    _, groups = spec.granularity.blocks(rows, columns)
    width = sum(packed_length(*part) for part in _row(spec, columns, groups))
    by_row = spec.scale_format != "float32" or groups == 1
    return {
        "weight": ((rows, width), torch.uint8),
        "weight_scale": ((rows,) if by_row else (rows, groups), torch.float32),
    }


def pack_weight(weight: Tensor, scales: Scales, spec: TensorSpec) -> dict[str, Tensor]:
    """Quantize a weight and pack it.

    Args:
        weight: `(N, K)` floating point.
        scales: As chosen for `spec`.
        spec: How it is quantized.

    Returns:
        The tensors of `stored_shapes`.
    """
    shapes = stored_shapes(spec, *weight.shape)
    if weight.is_meta:
        return {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in shapes.items()}
    bits = spec.grid.bits
    parts = [pack(quantize(weight, scales, spec), bits)]
    if scales.multiplier is not None:
        parts.append(pack((scales.multiplier - 1).to(torch.uint8), formats[spec.scale_format].bits))
    if scales.zero is not None:
        parts.append(pack((scales.zero - spec.grid.low).to(torch.uint8), bits))
    scale = scales.scale.float().reshape(shapes["weight_scale"][0])
    return {"weight": torch.cat(parts, dim=1), "weight_scale": scale}


def unpack_weight(state: Mapping[str, Tensor], spec: TensorSpec, columns: int) -> Tensor:
    """Return the float32 weight `(N, K)` that stored tensors stand for."""
    packed = state["weight"]
    _, groups = spec.granularity.blocks(len(packed), columns)
    layout = _row(spec, columns, groups)
    parts = packed.split([packed_length(*part) for part in layout], dim=1)
    codes, multiplier, zero = (
        unpack(part, bits, count) if count else None
        for part, (count, bits) in zip(parts, layout, strict=True)
    )
    assert codes is not None  # there is no weight without columns
    scales = Scales(
        state["weight_scale"].reshape(len(packed), -1),
        None if zero is None else zero.float() + spec.grid.low,
        None if multiplier is None else multiplier.float() + 1,
    )
    return dequantize(codes, scales, spec)
