"""The one rounding core: choose scales, quantize, dequantize, fake-quantize.

Everything here sees matrices `(R, K)` (see `dq.spec.Granularity`) and scales `(r, g)` that
broadcast over its blocks. Arithmetic is float32, whatever the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dq.bases import decode_signs, encode_signs, fit_signs
from dq.blocks import float_blocks, integer_blocks, outer_scale
from dq.observers import check_finite, observers
from dq.scales import Scales, scales_of_range
from dq.spec import TensorSpec

__all__ = ["choose_scales", "dequantize", "fake_quantize", "quantize", "straight_through"]

_STRIP = 1 << 18  # elements worked on together
# The largest value of a row, divided by the scale that was made of it, may come out a rounding
# error above the last level. It does not saturate, and its gradient must not be lost.
_EDGE = 1 + 1e-6


def choose_scales(x: Tensor, spec: TensorSpec) -> Scales:
    """Choose the scales of one known matrix (a weight, or a dynamic input) by the spec's observer.

    Args:
        x: `(R, K)` floating point.
        spec: How it is to be quantized.

    Returns:
        Scales `(r, g)`, or `(r, 1)` with multipliers `(r, g)`; on the meta device without values.

    Raises:
        DQError: If `x` has a value that is not finite.
    """
    if x.is_meta:
        return _valueless(spec.granularity.blocks(*x.shape), spec)
    if spec.granularity.kind == "tensor":
        return _ranged(x, spec)
    if not spec.has_float_blocks:
        return Scales.stack([_ranged(x[part], spec) for part in _strips(x)])
    reach = x.abs().amax(1, keepdim=True)
    check_finite(reach)
    outer = Scales(outer_scale(reach, spec))
    found = [
        float_blocks(_blocks(x[part].float(), spec), outer.rows(part).scale, spec)
        for part in _strips(x)
    ]
    return outer._replace(multiplier=torch.cat(found))


def _strips(x: Tensor) -> Iterator[slice]:
    """Cut `x` into strips of rows: temporaries stay small, and in the cache."""
    rows = max(1, _STRIP // x.shape[1])
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _ranged(x: Tensor, spec: TensorSpec) -> Scales:
    """Choose by the range that the spec's observer finds."""
    parts = _blocks(x.float(), spec)
    if spec.is_binary:
        check_finite(parts)
        scales = fit_signs(parts, spec.bases, not spec.symmetric)
        return scales if spec.scale_grid is None else integer_blocks(parts, scales.scale, spec)
    shape = parts.shape[:2]
    observer = observers[spec.observer](spec)
    observer.update(parts.flatten(0, 1))
    low, high = observer.range()
    scales = scales_of_range(low.reshape(shape), high.reshape(shape), spec)
    return scales if spec.scale_grid is None else integer_blocks(parts, scales.scale, spec)


def _blocks(x: Tensor, spec: TensorSpec) -> Tensor:
    """View the matrix `(R, K)` as `(r, g, elements that share a scale)`."""
    r, g = spec.granularity.blocks(*x.shape)
    return x.reshape(r, g, -1)


def _valueless(shape: tuple[int, ...], spec: TensorSpec) -> Scales:
    full = torch.empty(shape, device="meta")
    if spec.scale_grid is None:
        more = torch.empty(*shape, spec.bases - 1, device="meta") if spec.bases > 1 else None
        return Scales(full, None if spec.symmetric else full, None, more)
    return Scales(full[: None if spec.outer_by_row else 1, :1], None, full)


def quantize(x: Tensor, scales: Scales, spec: TensorSpec) -> Tensor:
    """Return the uint8 codes `(R, K)` of a floating point matrix."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    if x.is_meta:
        return codes
    for part in _strips(x):
        mine = scales.rows(part)
        if spec.is_binary:
            blocks = _blocks(x[part].float(), spec)
            codes[part] = encode_signs(blocks, mine).view(x[part].shape)
            continue
        levels = _blocks(x[part].float(), spec) / mine.step.unsqueeze(-1)
        codes[part] = spec.grid.encode(_shifted(levels, mine)).view(x[part].shape)
    return codes


def _shifted(levels: Tensor, scales: Scales) -> Tensor:
    """Add zero points to rounded levels, as kernels do; added before, odd ones would move ties."""
    return levels if scales.zero is None else torch.round(levels) + scales.zero.unsqueeze(-1)


def dequantize(codes: Tensor, scales: Scales, spec: TensorSpec) -> Tensor:
    """Return the float32 matrix `(R, K)` that uint8 `codes` stand for."""
    if spec.is_binary:
        return decode_signs(_blocks(codes, spec), scales).view(codes.shape)
    levels = _blocks(spec.grid.decode(codes), spec)
    if scales.zero is not None:
        levels = levels - scales.zero.unsqueeze(-1)
    return (levels * scales.step.unsqueeze(-1)).view(codes.shape)


class _StraightThrough(torch.autograd.Function):
    """The value of `rounded` with the gradient of `x` (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of `x`, which has its shape."""
    found: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return found


def fake_quantize(x: Tensor, scales: Scales, spec: TensorSpec) -> Tensor:
    """Quantize and dequantize a matrix, with straight-through gradients.

    The gradient to `x` is 1 where the value falls on the grid and 0 where it saturates, which signs
    do nowhere; scales get theirs from the same expression (LSQ, Esser et al. 2020, arXiv
    1902.08153, equation 3).

    Args:
        x: `(R, K)` floating point.
        scales: `(r, g)`.
        spec: The spec that the scales were made for.

    Returns:
        `(R, K)` float32, equal to `dequantize(quantize(x))`.
    """
    if spec.is_binary:
        parts = _blocks(x.float(), spec)
        value = decode_signs(encode_signs(parts.detach(), scales), scales)
        return (straight_through(parts, value) if x.requires_grad else value).view(x.shape)
    step = scales.step.unsqueeze(-1)
    levels = _blocks(x.float(), spec) / step
    with torch.no_grad():
        rounded = spec.grid.round(_shifted(levels, scales))
    if levels.requires_grad:
        if scales.zero is not None:
            levels = levels + scales.zero.unsqueeze(-1)
        inside = levels.clamp(spec.grid.low * _EDGE, spec.grid.high * _EDGE)
        rounded = straight_through(inside, rounded)
    if scales.zero is not None:
        rounded = rounded - scales.zero.unsqueeze(-1)
    return (rounded * step).view(x.shape)
