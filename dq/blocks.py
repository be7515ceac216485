"""Scales of blocks that are themselves written in a few bits.

A step then is a float32 scale, of a row or of the whole tensor, times a *multiplier* a block. Which
multiplier a block gets is the spec's `scale_rule`:

| scale format | multipliers            | scale      | rules                                  |
|--------------|------------------------|------------|----------------------------------------|
| "uint4"      | 1 to 16, whole numbers | a row      | search                                 |
| "e8m0"       | powers of two (MX)     | 1          | floor, ceil, even, rceil, search       |
| "e4m3"       | floats (NVFP4)         | one or row | nearest, four-six, search              |

"search" tries the multipliers near the one that reaches the block's largest magnitude and takes the
one of least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from dq.formats import FloatFormat, Format, formats
from dq.scales import Scales, positive, usable
from dq.spec import TensorSpec

__all__ = ["float_blocks", "integer_blocks", "outer_scale"]

_NEAR = 2  # whole multipliers tried on either side of the nearest
_BELOW = (0, 1, 2)  # powers of two tried, counted down from the smallest that clips nothing
_CODES = range(-8, 6)  # e4m3 multipliers tried, in codes from the nearest: a factor of 1/2 to 1.6
_ROOM = 256.0  # beside 448: leaves room for blocks whose largest magnitude goes to 4 instead of 6
_LOWEST, _HIGHEST = -127, 127  # exponents of E8M0


def outer_scale(reach: Tensor, spec: TensorSpec) -> Tensor:
    """Return the float32 scale that the multipliers of MX and NVFP4 blocks stand upon.

    Args:
        reach: `(R, 1)` floating point, the largest magnitude of each row.
        spec: Of a weight, or of a dynamic input, whose rows must not depend on each other.

    Returns:
        `(1, 1)`, or `(R, 1)` for dynamic inputs with floating-point multipliers.
    """
    if not isinstance(spec.scale_grid, FloatFormat):
        return torch.ones(1, 1, device=reach.device)
    if not spec.outer_by_row:
        reach = reach.amax().view(1, 1)
    top = spec.scale_grid.high if spec.scale_rule == "nearest" else _ROOM
    return usable(reach.float() / (spec.grid.high * top))


def float_blocks(parts: Tensor, outer: Tensor, spec: TensorSpec) -> Tensor:
    """Return the multipliers of MX and NVFP4 blocks.

    Args:
        parts: `(r, g, n)` float32, n elements a block.
        outer: What `outer_scale` returned, `(1, 1)` or `(r, 1)`.
        spec: With an E8M0 or a floating-point scale format.

    Returns:
        `(r, g)` float32, levels of the scale format.
    """
    reach = parts.abs().amax(-1)
    grid = spec.scale_grid
    if not isinstance(grid, FloatFormat):
        if spec.scale_rule != "search":
            return _power(_MX_RULES[spec.scale_rule](reach, spec.grid))
        whole = _rceil(reach, spec.grid)
        return _least((_power(whole - below) for below in _BELOW), parts, outer, spec)

    def rounded(multiplier: Tensor) -> Tensor:
        return grid.round(multiplier).clamp_min_(grid.tiny)  # 0 could not be divided by

    nearest = reach / spec.grid.high / outer
    if spec.scale_rule == "nearest":
        return rounded(nearest)
    if spec.scale_rule == "four-six":
        return _least((rounded(nearest * factor) for factor in (1.0, 1.5)), parts, outer, spec)
    code = grid.encode(nearest).int()
    tried = (grid.decode((code + offset).clamp_(1, grid.top).to(torch.uint8)) for offset in _CODES)
    return _least(tried, parts, outer, spec)


def _least(candidates: Iterable[Tensor], parts: Tensor, outer: Tensor, spec: TensorSpec) -> Tensor:
    """Return, for each block, the candidate of least squared error; the first of equals."""
    best, least = torch.ones_like(parts[..., 0]), torch.full_like(parts[..., 0], torch.inf)
    for candidate in candidates:
        error = _error(parts, outer * candidate, spec)
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best


def _error(parts: Tensor, step: Tensor, spec: TensorSpec) -> Tensor:
    step = step.unsqueeze(-1)
    return (spec.grid.round(parts / step) * step - parts).square().sum(-1)


def _power(exponent: Tensor) -> Tensor:
    power = exponent.clamp(_LOWEST, _HIGHEST)
    return torch.ldexp(torch.ones_like(power), power.int())


def _log2_below(x: Tensor) -> Tensor:
    """Return the exponent of the power of two at or below each magnitude; of 0 the lowest."""
    exponent = torch.frexp(x).exponent - 1
    return torch.where(x > 0, exponent, 2 * _LOWEST).float()


def _log2_above(x: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(x)
    return torch.where(x > 0, exponent - (fraction == 0.5).int(), 2 * _LOWEST).float()


def _floor(reach: Tensor, grid: Format) -> Tensor:
    """The least that OCP MX 1.0 asks for (section 6.3): the top of a block may saturate."""
    return _log2_below(reach) - grid.emax


def _ceil(reach: Tensor, grid: Format) -> Tensor:
    return _log2_above(reach) - grid.emax


def _even(reach: Tensor, grid: Format) -> Tensor:
    """Round the largest magnitude to the mantissa of an element first."""
    assert isinstance(grid, FloatFormat)  # checked by the spec
    fraction, exponent = torch.frexp(reach)
    steps = float(1 << (grid.mantissa + 1))  # levels from 1/2 to 1
    rounded = torch.ldexp(torch.floor(fraction * steps + 0.5) / steps, exponent)
    return _log2_below(rounded) - grid.emax


def _rceil(reach: Tensor, grid: Format) -> Tensor:
    """The smallest power of two that saturates nothing, as cuBLAS takes it."""
    return _log2_above(reach / grid.high)


_MX_RULES: Mapping[str, Callable[[Tensor, Format], Tensor]] = {
    "floor": _floor,
    "ceil": _ceil,
    "even": _even,
    "rceil": _rceil,
}


def integer_blocks(parts: Tensor, scale: Tensor, spec: TensorSpec) -> Scales:
    """Replace group scales by the best products of a row scale and a whole number.

    The multipliers around each group's own scale are tried, for a few row scales; least squares
    decides. (To try all of them changes the error by less than 0.01 dB and takes up to four times
    as long.)

    Args:
        parts: `(r, g, n)` float32, n elements a group.
        scale: `(r, g)` float32, what each group would have by itself.
        spec: With an unsigned integer scale format.

    Returns:
        Scales `(r, 1)` with multipliers `(r, g)`.
    """
    top = int(formats[spec.scale_format].high) + 1
    # A group of zeros has scale 1, above its largest magnitude: it must not coarsen its row.
    widest = torch.minimum(scale, parts.abs().amax(-1)).amax(1, keepdim=True) / top
    widest = positive(widest) if spec.is_binary else usable(widest)
    best_row, best_multiplier = widest, torch.ones_like(scale)
    best_error = torch.full_like(widest, torch.inf)
    for shrink in (1.0, 0.925, 0.85):
        row = widest * shrink
        middle = torch.round(scale / row)
        tried = ((middle + offset).clamp_(1, top) for offset in range(-_NEAR, _NEAR + 1))
        multiplier = _least(tried, parts, row, spec)
        total = _error(parts, row * multiplier, spec).sum(1, keepdim=True)
        best_multiplier = torch.where(total < best_error, multiplier, best_multiplier)
        best_row = torch.where(total < best_error, row, best_row)
        best_error = torch.minimum(total, best_error)
    return Scales(best_row, None, best_multiplier)
