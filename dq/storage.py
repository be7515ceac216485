"""From a float weight to the tensors that are stored, and back: pure, on any device, meta too.

Local names, without the prefix of the layer:

| name                | shape and dtype         | holds                                         |
|---------------------|-------------------------|-----------------------------------------------|
| `weight`            | (N, bytes) uint8        | packed codes                                  |
| `weight_scale`      | (N,) or (N, G) float32  | one a row, or one a group                     |
| `weight_multiplier` | (N, bytes) uint8        | two-level scales: packed group multipliers - 1 |
| `weight_zero`       | (N, bytes) uint8        | asymmetric formats: packed codes of zero      |
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


def stored_shapes(
    spec: TensorSpec, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each stored tensor of an `(N, K)` weight."""
    bits = spec.grid.bits
    _, groups = spec.granularity.blocks(rows, columns)
    two_level = spec.scale_format != "float32"
    by_row = two_level or groups == 1
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((rows, packed_length(columns, bits)), torch.uint8),
        "weight_scale": ((rows,) if by_row else (rows, groups), torch.float32),
    }
    if two_level:
        width = packed_length(groups, formats[spec.scale_format].bits)
        shapes["weight_multiplier"] = ((rows, width), torch.uint8)
    if not spec.symmetric:
        shapes["weight_zero"] = ((rows, packed_length(groups, bits)), torch.uint8)
    return shapes


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
    state = {
        "weight": pack(quantize(weight, scales, spec), bits),
        "weight_scale": scales.scale.float().reshape(shapes["weight_scale"][0]),
    }
    if scales.multiplier is not None:
        code = (scales.multiplier - 1).to(torch.uint8)
        state["weight_multiplier"] = pack(code, formats[spec.scale_format].bits)
    if scales.zero is not None:
        state["weight_zero"] = pack((scales.zero - spec.grid.low).to(torch.uint8), bits)
    return state


def unpack_weight(state: Mapping[str, Tensor], spec: TensorSpec, columns: int) -> Tensor:
    """Return the float32 weight `(N, K)` that stored tensors stand for."""
    bits = spec.grid.bits
    rows = len(state["weight"])
    _, groups = spec.granularity.blocks(rows, columns)
    multiplier = zero = None
    if "weight_multiplier" in state:
        width = formats[spec.scale_format].bits
        multiplier = unpack(state["weight_multiplier"], width, groups).float() + 1
    if "weight_zero" in state:
        zero = unpack(state["weight_zero"], bits, groups).float() + spec.grid.low
    scales = Scales(state["weight_scale"].reshape(rows, -1), zero, multiplier)
    return dequantize(unpack(state["weight"], bits, columns), scales, spec)
