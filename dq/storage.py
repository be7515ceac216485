"""From a quantized weight to the tensors that are stored, and back: pure, on any device, meta too.

Local names, without the prefix of the layer:

| name           | shape and dtype        | holds                                             |
|----------------|------------------------|---------------------------------------------------|
| `weight`       | (N, bytes) uint8       | by row, each packed: K codes, then G codes of     |
|                |                        | multipliers (groups with scales of few bits; of   |
|                |                        | integer ones minus one), then G codes of zero     |
|                |                        | (asymmetric formats)                              |
| `weight_scale` | (N,), (N, G) or (1,)   | one a row, one a group, or one for all (MX, where |
|                | float32                | it is 1, and NVFP4); several bases: G of each     |
|                |                        | follow each other, offsets are the last           |

Short codes share one tensor because every tensor costs about 130 bytes of file header; in files the
numbers of all layers share one as well: `dq.nn.joined`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dq.formats import IntFormat
from dq.packing import pack, packed_length, unpack
from dq.quantize import dequantize
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["pack_weight", "stored_shapes", "unpack_codes", "unpack_weight"]


def _row(spec: TensorSpec, columns: int, groups: int) -> list[tuple[int, int]]:
    """Return (number of codes, bits) of codes, multipliers and zeros; absent ones have number 0."""
    bits, scales = spec.code_bits, spec.scale_grid
    return [
        (columns, bits),
        (0, 1) if scales is None else (groups, scales.bits),
        (0 if spec.symmetric or spec.is_binary else groups, bits),
    ]


def stored_shapes(
    spec: TensorSpec, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each stored tensor of an `(N, K)` weight."""
    _, groups = spec.granularity.blocks(rows, columns)
    width = sum(packed_length(*part) for part in _row(spec, columns, groups))
    numbers = groups * _each(spec)
    scale: tuple[int, ...] = (rows,) if numbers == 1 else (rows, numbers)
    if spec.scale_grid is not None:
        scale = (rows if spec.outer_by_row else 1,)
    return {"weight": ((rows, width), torch.uint8), "weight_scale": (scale, torch.float32)}


def pack_weight(codes: Tensor, scales: Scales, spec: TensorSpec) -> dict[str, Tensor]:
    """Pack a quantized weight.

    Args:
        codes: `(N, K)` uint8, as `dq.quantize.quantize` or a rounding method gives them.
        scales: That they were made with.
        spec: How the weight is quantized.

    Returns:
        The tensors of `stored_shapes`.
    """
    shapes = stored_shapes(spec, *codes.shape)
    if codes.is_meta:
        return {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in shapes.items()}
    parts = [pack(codes, spec.code_bits)]
    if scales.multiplier is not None:
        assert spec.scale_grid is not None  # where else would they come from
        multipliers = spec.scale_grid.encode(scales.multiplier - _least(spec))
        parts.append(pack(multipliers, spec.scale_grid.bits))
    if scales.zero is not None and not spec.is_binary:
        parts.append(pack((scales.zero - spec.grid.low).to(torch.uint8), spec.grid.bits))
    scale = _beside(scales, spec).float().reshape(shapes["weight_scale"][0])
    weight = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return {"weight": weight, "weight_scale": scale}


def _each(spec: TensorSpec) -> int:
    """Return how many float32 numbers a group has."""
    return spec.bases + (spec.is_binary and not spec.symmetric)


def _beside(scales: Scales, spec: TensorSpec) -> Tensor:
    """Return the float32 numbers of all groups: of bases first scales, then more, then offsets."""
    if _each(spec) == 1:
        return scales.scale
    every = [scales.scale, *([] if scales.more is None else scales.more.unbind(-1))]
    every += [] if scales.zero is None else [scales.zero]
    return torch.cat(every, 1)


def _from_beside(numbers: Tensor, spec: TensorSpec) -> Scales:
    """Invert `_beside` for binary formats."""
    first, *rest = numbers.chunk(_each(spec), 1)
    zero = None if spec.symmetric else rest.pop()
    return Scales(first, zero, None, torch.stack(rest, -1) if rest else None)


def _least(spec: TensorSpec) -> int:
    """Return the multiplier that code 0 stands for, beside what its format says."""
    return 1 if isinstance(spec.scale_grid, IntFormat) else 0


def unpack_codes(
    state: Mapping[str, Tensor], spec: TensorSpec, columns: int
) -> tuple[Tensor, Scales]:
    """Invert `pack_weight`."""
    packed = state["weight"]
    _, groups = spec.granularity.blocks(len(packed), columns)
    layout = _row(spec, columns, groups)
    parts = packed.split([packed_length(*part) for part in layout], dim=1)
    codes, multiplier, zero = (
        unpack(part, bits, count) if count else None
        for part, (count, bits) in zip(parts, layout, strict=True)
    )
    assert codes is not None  # there is no weight without columns
    if multiplier is not None:
        assert spec.scale_grid is not None  # as in the layout
        multiplier = spec.scale_grid.decode(multiplier) + _least(spec)
    scale = state["weight_scale"]
    if _each(spec) > 1:
        return codes, _from_beside(scale.reshape(len(packed), -1), spec)
    shared = spec.scale_grid is not None and not spec.outer_by_row
    return codes, Scales(
        scale.view(1, 1) if shared else scale.reshape(len(packed), -1),
        None if zero is None else zero.float() + spec.grid.low,
        multiplier,
    )


def unpack_weight(state: Mapping[str, Tensor], spec: TensorSpec, columns: int) -> Tensor:
    """Return the float32 weight `(N, K)` that stored tensors stand for."""
    codes, scales = unpack_codes(state, spec, columns)
    return dequantize(codes, scales, spec)
