"""What kernels are told about a packed layer."""

from __future__ import annotations

from typing import Any

from dq.formats import FloatFormat, IntFormat, formats
from dq.kernels import Site
from dq.plan import LayerSpec
from dq.spec import TensorSpec

__all__ = ["numbers_of", "site_of"]


def site_of(spec: LayerSpec, kind: str, device: str, rows: int, columns: int, groups: int) -> Site:
    """Return what a kernel has to do for a layer.

    Args:
        spec: How it is quantized.
        kind: "linear" or "conv2d".
        device: Device type.
        rows: Output features N.
        columns: Features K that are summed over.
        groups: Of a convolution; 1 for linears.
    """
    weight, low = spec.weight, spec.input
    weight_kind = "int8" if weight.is_int8 else _float_kind(weight)
    if spec.salient is not None:
        weight_kind = "other"
    input_kind = "float" if low is None else "other"
    if low is not None and (low.grid.low < 0 or not low.dynamic):
        if isinstance(low.grid, IntFormat) and low.granularity.kind != "group":
            input_kind = "int8"
        elif not spec.input_splits:
            input_kind = _float_kind(low)
    return Site(kind, device, rows, columns, weight_kind, input_kind, groups)


def numbers_of(spec: LayerSpec, columns: int) -> dict[str, Any]:
    """Return what kernels must know beside the tensors; see `dq.kernels.Arguments`.

    Args:
        spec: How the layer is quantized.
        columns: Features K that are summed over.
    """
    weight, low = spec.weight, spec.input
    multiplier = weight.scale_grid
    return {
        "weight_bits": weight.code_bits,
        "columns": columns,
        "multiplier_bits": 0 if multiplier is None else multiplier.bits,
        "groups": 0 if multiplier is None else columns // weight.granularity.size,
        "input_bits": 0 if low is None else low.grid.bits,
        "segments": list(spec.input_splits),
        "weight_format": weight.format,
        "input_format": "" if low is None else low.format,
        "input_rule": "" if low is None else low.scale_rule,
    }


def _float_kind(spec: TensorSpec) -> str:
    """Return what a tensor of floats is to kernels, "other" for those that none knows."""
    if not isinstance(spec.grid, FloatFormat) or not formats["e4m3"].contains(spec.grid):
        return "other"
    if spec.has_float_blocks:
        blocks = spec.block_format or "other"
        # e4m3 holds the levels of all MX elements of 6 and 8 bits but e5m2's.
        return "mxfp8" if blocks.startswith(("mxfp6", "mxfp8")) else blocks
    # Kernels find the scale of a token by its largest magnitude.
    found = not spec.dynamic or spec.observer == "absmax"
    return "fp8" if spec.granularity.kind != "group" and found else "other"
