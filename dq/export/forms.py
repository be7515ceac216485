"""The forms that other libraries know: which one a weight has, and its bytes there.

| form              | bytes of a weight, and its scales                                            |
|-------------------|------------------------------------------------------------------------------|
| "fp8"             | `(N, K)` float8_e4m3fn; `(N,)` float32                                       |
| "int8"            | `(N, K)` int8; `(N,)` float32                                                |
| "groups"          | codes of whole numbers; `(N, G)` float32 of each group                       |
| "nvfp4"           | `(N, K / 2)` uint8; `(N, K / 16)` float8_e4m3fn; a float32 for all           |
| "mxfp4"           | `(N, K / 2)` uint8; `(N, K / 32)` uint8, E8M0                                |
| "mxfp6", "mxfp8"  | `(N, K)` uint8, an element a byte; `(N, K / 32)` uint8, E8M0                 |

Of two elements in a byte the first lies in the low half. "mxfp6-e3m2" and "mxfp8-e5m2" are forms
of their own. Nothing is rounded: the numbers are those of the packed layer, written otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dq.formats import formats
from dq.nn import PackedLayer
from dq.scales import Scales
from dq.spec import TensorSpec
from dq.storage import unpack_codes

__all__ = ["Blocks", "codes_of", "e2m1_pairs", "form", "fp8", "int8", "mx", "nvfp4"]


class Blocks(NamedTuple):
    """A weight with a scale a block.

    Attributes:
        elements: `(N, K)` or, two in a byte, `(N, K / 2)` uint8.
        scales: `(N, K / n)` float8_e4m3fn (NVFP4) or uint8 (MX).
        outer: `()` float32 that multiplies all of them; 1 for MX.
    """

    elements: Tensor
    scales: Tensor
    outer: Tensor


def form(spec: TensorSpec) -> str | None:
    """Return the form that holds a weight without rounding it; None if there is none.

    Integers with a scale a row are int8 whatever their width, with whole multipliers a group too:
    code times multiplier is an 8-bit integer (see `dq.spec`). Floats with a scale a row are fp8 if
    all of their levels are e4m3 ones.
    """
    if spec.grid.is_integer:
        grouped = spec.symmetric and spec.scale_grid is None and spec.bases == 1
        return "int8" if spec.is_int8 else "groups" if grouped else None
    if spec.has_float_blocks:
        return spec.block_format
    return "fp8" if spec.scaled_by_row and formats["e4m3"].contains(spec.grid) else None


def fp8(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Return levels `(N, K)` float8_e4m3fn and scales `(N,)` float32 of a weight of form fp8."""
    codes, scales = _unpacked(layer)
    return layer.spec.weight.grid.decode(codes).to(torch.float8_e4m3fn), scales.scale.flatten()


def int8(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """Return levels `(N, K)` int8 and scales `(N,)` float32 of a weight of form int8."""
    codes, scales = _unpacked(layer)
    levels = layer.spec.weight.grid.decode(codes)
    if scales.multiplier is not None:
        groups = scales.multiplier.shape[1]
        levels = (levels.unflatten(1, (groups, -1)) * scales.multiplier.unsqueeze(-1)).flatten(1)
    return levels.to(torch.int8), scales.scale.flatten()


def codes_of(layer: PackedLayer) -> tuple[Tensor, Tensor, float]:
    """Return codes `(N, K)` uint8, the scale of a code and its zero, W = (code - zero) scale.

    Scales are `(N, G)` float32. Of signs, whose codes are 0 and 1, the zero is 1/2.
    """
    codes, scales = _unpacked(layer)
    spec = layer.spec.weight
    if spec.is_binary:
        return codes, 2 * scales.step, 0.5
    return codes, scales.step, float(1 << (spec.code_bits - 1))


def nvfp4(layer: PackedLayer) -> Blocks:
    """Return the bytes of a weight of form nvfp4."""
    codes, scales = _unpacked(layer)
    assert scales.multiplier is not None  # the form has one a block
    written = formats["e4m3"].encode(scales.multiplier).view(torch.float8_e4m3fn)
    return Blocks(e2m1_pairs(codes), written, scales.scale.reshape(()))


def mx(layer: PackedLayer) -> Blocks:
    """Return the bytes of a weight of one of the MX forms."""
    codes, scales = _unpacked(layer)
    assert scales.multiplier is not None  # the forms have one a block
    elements = e2m1_pairs(codes) if layer.spec.weight.grid.bits == 4 else codes.clone()
    return Blocks(elements, formats["e8m0"].encode(scales.multiplier), scales.scale.reshape(()))


def e2m1_pairs(codes: Tensor) -> Tensor:
    """Return two 4-bit codes a byte, the first in the low half: `(N, K)` to `(N, K / 2)` uint8."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _unpacked(layer: PackedLayer) -> tuple[Tensor, Scales]:
    state = {"weight": layer.weight.detach().flatten(1), "weight_scale": layer.weight_scale}
    return unpack_codes(state, layer.spec.weight, layer.columns)
