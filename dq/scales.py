"""Scales: the numbers that place a grid of levels on a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dq.formats import IntFormat
from dq.spec import TensorSpec

__all__ = ["Scales", "positive", "scales_of_range", "usable"]


class Scales(NamedTuple):
    """Scales of an `(R, K)` matrix: x ~ step * (level - zero), plus what further bases add.

    Attributes:
        scale: `(r, g)` float32, positive; `(r, 1)` or `(1, 1)` when there are multipliers.
        zero: `(r, g)` float32 whole levels, of binary formats any number; None for symmetric specs.
        multiplier: `(r, g)` float32, what the spec's `scale_format` can write; None for scales of
            one level. See `dq.blocks`.
        more: `(r, g, bases - 1)` float32, the scales of further bases, or None. See `dq.bases`.
    """

    scale: Tensor
    zero: Tensor | None = None
    multiplier: Tensor | None = None
    more: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """Distance between neighbouring integers, `(r, g)` float32."""
        return self.scale if self.multiplier is None else self.scale * self.multiplier

    def rows(self, part: slice) -> Scales:
        """Return the scales of some rows of the matrix; `(1, 1)` ones serve every row."""
        return Scales(*(x if x is None or len(x) == 1 else x[part] for x in self))  # type: ignore[arg-type]

    @classmethod
    def stack(cls, parts: Sequence[Scales]) -> Scales:
        """Join the scales of consecutive rows."""
        zeros = [p.zero for p in parts if p.zero is not None]
        multipliers = [p.multiplier for p in parts if p.multiplier is not None]
        more = [p.more for p in parts if p.more is not None]
        return cls(
            torch.cat([p.scale for p in parts]),
            torch.cat(zeros) if zeros else None,
            torch.cat(multipliers) if multipliers else None,
            torch.cat(more) if more else None,
        )


def scales_of_range(low: Tensor, high: Tensor, spec: TensorSpec) -> Scales:
    """Return the scales that map `[low, high]` onto the grid.

    Args:
        low: Smallest values, any shape, float32.
        high: Largest values, same shape.
        spec: Symmetric specs use the larger magnitude; asymmetric ones always contain zero, so that
            padding is exact.

    Returns:
        Scales of the same shape, without multipliers; all-zero ranges get scale 1.
    """
    grid = spec.grid
    if spec.symmetric:
        # An unsigned grid has no negative levels: what is below zero saturates there.
        reach = torch.maximum(-low, high) if grid.low < 0 else high
        return Scales(usable(reach / grid.high))
    assert isinstance(grid, IntFormat)  # checked by the spec
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = usable((high - low) / (grid.high - grid.low))
    return Scales(scale, torch.round(grid.low - low / scale).clamp_(grid.low, grid.high))


def positive(scale: Tensor) -> Tensor:
    """Return scales of formats without a zero: those of blocks of zeros become next to nothing."""
    return scale.clamp_min(1e-12)


def usable(scale: Tensor) -> Tensor:
    """Return the scales with 1 in the place of those that are as good as zero."""
    # Dividing by a subnormal overflows; such a block is all zero for every purpose.
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
